"""One thread that decodes for all clients: jobs wait in line, join the batch as soon as there is room, and leave it."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Condition, Lock, Thread

from cllm.decoding import Queue, RowResult
from cllm.decoding.feeder import Feeder, Job
from cllm.decoding.queue import free_memory
from cllm.decoding.result import Stop

logger = logging.getLogger(__name__)


class Busy(Exception):
    """Too many requests are waiting."""


class Closed(Exception):
    """The worker accepts no more requests."""


class Failed(Exception):
    """One request failed."""


@dataclass(frozen=True)
class Progress:
    """What a job has gained since the last report."""

    steps: list[list[int]]  # new token ids, one list per forward
    stop: Stop | None = None  # in the last report only
    error: Exception | None = None  # Failed or Closed: why the job ended without an answer
    reused: int = 0  # tokens of the prompt whose keys and values were cached


@dataclass(eq=False)
class ReportingJob(Job):
    """A response being written. ``report`` is called in the worker's thread, and must not block."""

    report: Callable[[Progress], None]
    reported: int = 0  # tokens
    company: float = math.inf  # the most jobs that may be decoded together with this one, itself included

    def update(self, result: RowResult, stop: Stop | None = None) -> None:
        """Report what is new in ``result``, if anything is."""
        new, self.reported = result.steps_after(self.reported), max(self.reported, len(result.token_ids))
        if not self.cancelled and (new or stop):
            self.report(Progress(new, stop, reused=result.reused))

    def fail(self, error: Exception) -> None:
        """End without an answer. If the job has a row, it leaves the batch like that of any cancelled job."""
        if not self.cancelled:
            self.cancelled = True
            self.report(Progress([], error=error))


class Worker:
    """Decodes jobs in the order they were submitted, as many at once as ``queue`` allows.

    When memory runs out, the jobs inside are decoded again, half as many at a time from then on. After any other error they are
    decoded again in smaller and smaller groups, until the job at fault is alone and fails; the others continue where they were.
    ``device`` is held while anything is decoded, so that others can use the model between two runs.
    """

    def __init__(self, queue: Queue, max_waiting: int) -> None:
        self.queue, self.max_waiting = queue, max_waiting
        self.device = Lock()
        self._waiting: deque[ReportingJob] = deque()
        self._feeder = Feeder(self._take, partial(self._report, ended=True), self._report)
        self._change = Condition()
        self._closed = self._stopped = False
        self._thread = Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- public, for any thread

    def submit(self, jobs: Sequence[ReportingJob]) -> None:
        """Put all jobs in line, or none. Raises Busy if the line would be too long, Closed after :meth:`close`."""
        with self._change:
            if self._closed:
                raise Closed("the server is shutting down")
            if len(self._waiting) + len(jobs) > self.max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting, and at most {self.max_waiting} may")
            self._waiting.extend(jobs)
            self._change.notify()

    def cancel(self, jobs: Sequence[ReportingJob]) -> None:
        """Drop jobs that wait or are being decoded; nothing happens to those that have ended."""
        with self._change:
            for job in jobs:
                job.cancelled = True
            self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def close(self) -> None:
        """Take no more jobs; those already submitted are finished."""
        with self._change:
            self._closed = True

    def stop(self) -> None:
        """End all jobs with an error, then the thread."""
        self.close()
        with self._change:
            self._stopped = True
            self._change.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        """Rows of the batch."""
        return len(self._feeder.inside)

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
            with suppress(Exception):  # a lost device frees nothing
                free_memory()  # only now: the error held on to tensors
        with self._change:
            for job in [*self._feeder.empty(), *self._waiting]:
                with _contained(job):
                    job.fail(Closed("the server was shut down before the answer was complete"))
            self._waiting.clear()

    def _wait(self) -> bool:
        """Sleep until a job waits; False when it is time to stop."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._stopped)
            return not self._stopped

    def _decode(self) -> None:
        """Decode until nothing is left, which also frees the cache."""
        for _ in self._feeder.run(self.queue.decoder):
            if self._stopped:
                return

    def _report(self, job: ReportingJob, result: RowResult, ended: bool = False) -> None:
        with _contained(job):
            job.update(result, result.stop if ended else None)

    def _take(self) -> Iterator[ReportingJob]:
        """The jobs next in line that there is room for. One that can never be decoded fails, and the next follows."""
        with self._change:
            while self._waiting:
                job = self._waiting[0]
                with _contained(job):
                    if self._feeder.inside and not self._fits(job):
                        return
                    self.queue.check(job.request)
                    yield job
                self._waiting.popleft()

    def _fits(self, job: ReportingJob) -> bool:
        together = [*self._feeder.inside.values(), job]
        return len(together) <= min(one.company for one in together) and self.queue.fits(together)

    def _put_back(self, error: Exception) -> None:
        """Let the jobs inside wait again, before all others; where there is only one, let it fail."""
        with self._change:
            jobs = self._feeder.empty()
            if not jobs and self._waiting:  # none got in: the next one must not be tried for ever
                jobs = [self._waiting.popleft()]
            if not self._shrinks(error):
                if len(jobs) == 1:
                    _fail(jobs.pop(), error)
                else:
                    logger.warning("decoding failed; the jobs are tried again in smaller groups: %s", error, exc_info=error)
                for job in jobs:
                    job.company = len(jobs) // 2
            self._waiting.extendleft(job for job in reversed(jobs) if not job.cancelled)

    def _shrinks(self, error: Exception) -> bool:
        """Whether memory ran out, and the queue now needs less."""
        try:
            return self.queue.shrink(error)
        except Exception as another:
            logger.error("cannot go on in less memory: %s", another, exc_info=another)
            return False


@contextmanager
def _contained(job: ReportingJob) -> Iterator[None]:
    """An error inside ends this job and no other."""
    try:
        yield
    except Exception as error:
        _fail(job, error)


def _fail(job: ReportingJob, error: Exception) -> None:
    logger.error("a request failed: %s", error, exc_info=error)
    with suppress(Exception):  # where reporting is what failed, there is nobody to tell
        job.fail(Failed("the model failed on this request; the server's log says why"))
