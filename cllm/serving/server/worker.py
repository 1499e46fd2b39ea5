"""One thread that decodes for all clients: requests wait in line, join the batch as soon as there is room, and leave it."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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


class Failed(Exception):
    """Something went wrong with one request."""


@dataclass(frozen=True)
class Progress:
    """What a job has gained since the last report."""

    steps: list[list[int]]  # token ids, apart by the forwards that brought them
    stop: Stop | None = None  # said once, at the end
    error: Exception | None = None  # Failed or Closed: why the job ended without an answer
    reused: int = 0  # tokens of the prompt that need not be computed


@dataclass(eq=False)
class Job:
    """One response in the making. ``report`` is called in the worker's thread, and must not block."""

    request: Request
    report: Callable[[Progress], None]
    cancelled: bool = False
    reported: int = 0  # tokens
    company: float = math.inf  # how many jobs may be decoded together with this one, itself included

    def update(self, result: RowResult, stop: Stop | None = None) -> None:
        """Report what is new in ``result``, if anything is."""
        new, self.reported = result.steps_after(self.reported), max(self.reported, len(result.token_ids))
        if not self.cancelled and (new or stop):
            self.report(Progress(new, stop, reused=result.reused))

    def fail(self, error: Exception) -> None:
        """End without an answer. A row that the job still has leaves the batch like that of any cancelled job."""
        if not self.cancelled:
            self.cancelled = True
            self.report(Progress([], error=error))


class Worker:
    """Decodes jobs in the order they were submitted, as many at once as ``queue`` allows.

    When memory runs out, the jobs inside are decoded again, and from then on half as many together. After any other error they
    are decoded again in ever smaller groups, until the job at fault is alone and fails; the others go on where they were.
    ``device`` is held while anything is decoded, so that others can use the model between two runs.
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
            except Exception as error:
                self._put_back(error)
            with suppress(Exception):  # a lost device gives nothing back
                free_memory()  # what the error held on to is gone by now
        with self._change:
            for job in [*self._inside.values(), *self._waiting]:
                with _contained(job):
                    job.fail(Closed("the server was shut down before the answer was complete"))
            self._inside.clear()
            self._waiting.clear()

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
            taken = self._take(fed)
            fed += len(taken)
            return taken

        for iteration in self.queue.decoder.flow(feed, unwanted):
            tally.add(iteration)
            if self._stopped:
                return

    def _report(self, tally: Tally, running: list[int]) -> None:
        for row, job in [*self._inside.items()]:
            ended = row not in running
            result = tally.take(row, job.request.max_new_tokens) if ended else tally.so_far(row)
            with _contained(job):
                job.update(result, result.stop if ended else None)
            if ended:
                del self._inside[row]

    def _take(self, row: int) -> list[Request]:
        """The requests next in line that there is room for. Their jobs are inside from now on, the first one as ``row``."""
        taken: list[Request] = []
        with self._change:
            while self._waiting:
                job = self._waiting[0]
                with _contained(job):
                    if self._inside and not self._fits(job):
                        break
                    self.queue.check(job.request)
                    self._inside[row + len(taken)] = job
                    taken.append(job.request)
                self._waiting.popleft()
        return taken

    def _fits(self, job: Job) -> bool:
        together = [*self._inside.values(), job]
        most = min(one.company for one in together)
        return len(together) <= most and self.queue.fits([one.request for one in together])

    def _put_back(self, error: Exception) -> None:
        """Let those inside wait again, before all others, or fail the only one. They report what they have not yet."""
        with self._change:
            if not self._inside and self._waiting:  # nobody got in: it must not be tried for ever
                self._inside[0] = self._waiting.popleft()
            jobs = [*self._inside.values()]
            self._inside.clear()
            if not self._shrinks(error):
                if len(jobs) == 1:
                    _fail(jobs.pop(), error)
                else:
                    logger.warning("decoding failed; what was decoded is tried again, apart: %s", error, exc_info=error)
                for job in jobs:
                    job.company = len(jobs) // 2
            self._waiting.extendleft(job for job in reversed(jobs) if not job.cancelled)

    def _shrinks(self, error: Exception) -> bool:
        """Whether memory ran out, and less of it will be needed from now on."""
        try:
            return self.queue.shrink(error)
        except Exception as another:
            logger.error("cannot go on in less memory: %s", another, exc_info=another)
            return False


@contextmanager
def _contained(job: Job) -> Iterator[None]:
    """What goes wrong inside ends this job alone."""
    try:
        yield
    except Exception as error:
        _fail(job, error)


def _fail(job: Job, error: Exception) -> None:
    logger.error("a request failed: %s", error, exc_info=error)
    with suppress(Exception):  # where telling is what failed, nobody can be told
        job.fail(Failed("the model failed on this request; the server's log says why"))
