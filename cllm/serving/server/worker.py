"""One thread that decodes for all clients: requests wait in line, join the batch as soon as there is room, and leave it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Condition, Lock, Thread

from cllm.decoding import Queue, Request, RowResult
from cllm.decoding.queue import free_memory
from cllm.decoding.result import Stop, Tally

logger = logging.getLogger(__name__)


class Busy(Exception):
    """More requests are waiting than the worker takes."""


class Closed(Exception):
    """The worker takes no more requests."""


@dataclass(frozen=True)
class Progress:
    """What a job has gained since the last report."""

    steps: list[list[int]]  # token ids, apart by the forwards that brought them
    stop: Stop | None = None  # said once, at the end
    error: str | None = None  # why the job ended without an answer
    reused: int = 0  # tokens of the prompt that need not be computed


@dataclass(eq=False)
class Job:
    """One response in the making. ``report`` is called in the worker's thread, and must not block."""

    request: Request
    report: Callable[[Progress], None]
    cancelled: bool = False
    reported: int = 0  # tokens

    def update(self, result: RowResult, stop: Stop | None = None) -> None:
        """Report what is new in ``result``, if anything is."""
        new, self.reported = result.behind(self.reported), max(self.reported, len(result.token_ids))
        if not self.cancelled and (new or stop):
            self.report(Progress(new, stop, reused=result.reused))


class Worker:
    """Decodes jobs in the order they were submitted, as many at once as ``queue`` allows.

    Out of memory, those inside are decoded again, half as many together. ``device`` is held while anything is decoded, so
    that others can use the model between two runs.
    """

    def __init__(self, queue: Queue, max_waiting: int) -> None:
        self.queue, self.max_waiting = queue, max_waiting
        self.device = Lock()
        self._waiting: deque[Job] = deque()
        self._inside: dict[int, Job] = {}  # rows of the present run
        self._change = Condition()
        self._closed = self._stopped = False
        self._thread = Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- public, for any thread

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs in line, all or none. Raises Busy where the line is too long, Closed after :meth:`close`."""
        with self._change:
            if self._closed:
                raise Closed("the server is shutting down")
            if len(self._waiting) + len(jobs) > self.max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting, and at most {self.max_waiting} may")
            self._waiting.extend(jobs)
            self._change.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget jobs, wherever they are; those that have ended are none the worse for it."""
        with self._change:
            for job in jobs:
                job.cancelled = True
            self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def close(self) -> None:
        """Take no more jobs; those submitted go on."""
        with self._change:
            self._closed = True

    def stop(self) -> None:
        """End all jobs with an error, and the thread."""
        self.close()
        with self._change:
            self._stopped = True
            self._change.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        """Rows of the batch."""
        return len(self._inside)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._closed

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while self._wait():
            try:
                with self.device:
                    self._decode()
                continue
            except Exception as error:  # one bad batch must not end the server
                if self.queue.shrink(error):
                    self._put_back()
                else:
                    logger.error("decoding failed: %s", error, exc_info=True)
                    self._fail("the model failed on this batch of requests; the server's log says why")
            free_memory()  # what the error held on to is gone by now
        self._fail("the server was shut down before the answer was complete")

    def _wait(self) -> bool:
        """Sleep until a job waits; False when it is time to stop."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._stopped)
            return not self._stopped

    def _decode(self) -> None:
        """Decode until nothing is left, which also frees the cache."""
        tally = Tally(self.queue.decoder.eos_ids.tolist())
        unwanted: set[int] = set()
        fed = 0

        def feed(running: list[int]) -> list[Request]:
            nonlocal fed
            self._report(tally, running)
            unwanted.clear()
            unwanted.update(row for row, job in self._inside.items() if job.cancelled)
            taken = self._take()
            self._inside.update(enumerate(taken, fed))
            fed += len(taken)
            return [job.request for job in taken]

        for iteration in self.queue.decoder.flow(feed, unwanted):
            tally.add(iteration)
            if self._stopped:
                return

    def _report(self, tally: Tally, running: list[int]) -> None:
        for row in running:
            self._inside[row].update(tally.so_far(row))
        for row in sorted(self._inside.keys() - set(running)):
            job = self._inside.pop(row)
            result = tally.take(row, job.request.max_new_tokens)
            job.update(result, result.stop)

    def _take(self) -> list[Job]:
        """The jobs next in line that there is room for."""
        taken: list[Job] = []
        beside = [job.request for job in self._inside.values()]
        with self._change:
            while self._waiting and self.queue.fits([*beside, self._waiting[0].request]):
                taken.append(self._waiting.popleft())
                beside.append(taken[-1].request)
        return taken

    def _put_back(self) -> None:
        """Let those inside wait again, before all others. They are decoded anew, and report what they have not yet."""
        with self._change:
            self._waiting.extendleft(job for job in reversed(self._inside.values()) if not job.cancelled)
            self._inside.clear()

    def _fail(self, reason: str) -> None:
        """End what is running, and, when the worker stops, what waits."""
        with self._change:
            failed = list(self._inside.values())
            self._inside.clear()
            if self._stopped:
                failed += self._waiting
                self._waiting.clear()
        for job in failed:
            if not job.cancelled:
                job.report(Progress([], error=reason))
