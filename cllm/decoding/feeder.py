"""The jobs that go through the engine's loop: each takes a row when there is room, and leaves it when its text has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

from cllm.decoding.engine import JacobiDecoder, Request
from cllm.decoding.result import RowResult, Tally


@dataclass(eq=False)
class Job:
    """A request to decode. Its row ends early once it is cancelled."""

    request: Request
    cancelled: bool = field(default=False, kw_only=True)


AnyJob = TypeVar("AnyJob", bound=Job)


class Feeder(Generic[AnyJob]):
    """Feeds jobs to an engine. ``inside`` holds those that have a row, by its number.

    Whenever the host looks at the rows, ``ended`` is called with each job that has ended and its result, ``running`` (if given)
    with each other job and its result so far, and then ``take`` for jobs to join, which are inside one by one as it gives them.
    """

    def __init__(
        self,
        take: Callable[[], Iterable[AnyJob]],
        ended: Callable[[AnyJob, RowResult], None],
        running: Callable[[AnyJob, RowResult], None] | None = None,
    ) -> None:
        self.inside: dict[int, AnyJob] = {}
        self._take, self._ended, self._running = take, ended, running

    def run(self, decoder: JacobiDecoder) -> Iterator[None]:
        """Decode until no job is inside and none joins, one step for each iteration of the engine.

        After an error, the jobs that it left unfinished are still inside.
        """
        tally, numbers, cancelled = Tally(decoder.eos_ids.tolist()), count(), set[int]()

        def feed(rows: list[int]) -> list[Request]:
            for row, job in [*self.inside.items()]:
                if row not in rows:
                    self._ended(job, tally.take(row, job.request.max_new_tokens))
                    del self.inside[row]
                elif self._running is not None:
                    self._running(job, tally.so_far(row))
            cancelled.clear()
            cancelled.update(row for row, job in self.inside.items() if job.cancelled)
            joining = []
            for job in self._take():
                self.inside[next(numbers)] = job
                joining.append(job.request)
            return joining

        for iteration in decoder.flow(feed, cancelled):
            tally.add(iteration)
            yield

    def empty(self) -> list[AnyJob]:
        """Take all jobs out, in the order in which they joined."""
        jobs = [*self.inside.values()]
        self.inside.clear()
        return jobs
