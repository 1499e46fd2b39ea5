"""Continuous batching: requests wait in a queue, and one joins the batch for every row that finishes.

The sliding window makes this cheap: each row has its own position, so a new row need not wait for the others.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from cllm.decoding.engine import JacobiDecoder, Request
from cllm.decoding.feeder import Feeder, Job
from cllm.decoding.result import RowResult
from cllm.errors import UsageError, out_of_memory

logger = logging.getLogger(__name__)

LOOKAHEAD = 16  # batches of requests that are sorted by length together


@dataclass(eq=False)
class _Numbered(Job):
    number: int


@dataclass
class Queue:
    """Decodes any number of requests, ``batch_size`` rows at a time, in bounded memory.

    ``max_slots`` bounds the key-value cache: rows times the longest text that any of them may reach, in tokens. A batch
    then has fewer rows while long texts are in it. None: the batch size is the only bound.
    """

    decoder: JacobiDecoder
    batch_size: int
    max_slots: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be >= 1, got {self.batch_size}")

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, RowResult]]:
        """Results as their rows finish, each with the number of its request, counted from 0.

        Requests are read as they are needed. When memory runs out, the unfinished ones are decoded again, half as many at a time.
        Raises UsageError for a request that :meth:`check` refuses.
        """
        source = (_Numbered(request, number) for number, request in enumerate(requests))
        waiting: list[_Numbered] = []  # the longest last
        finished: list[tuple[int, RowResult]] = []

        def take() -> Iterator[_Numbered]:
            """The next jobs that there is room for, the longest first, so that none of those is left over."""
            if len(feeder.inside) < self.batch_size and len(waiting) < self.batch_size:
                for job in islice(source, LOOKAHEAD * self.batch_size):
                    self.check(job.request, f"prompt {job.number}")
                    waiting.append(job)
                self._sort(waiting)
            while waiting and self.fits([*feeder.inside.values(), waiting[-1]]):
                yield waiting.pop()

        feeder = Feeder(take, lambda job, result: finished.append((job.number, result)))
        while True:
            try:
                for _ in feeder.run(self.decoder):
                    yield from finished
                    finished.clear()
                yield from finished
                return
            except Exception as error:
                if not self.shrink(error):
                    raise
            waiting += feeder.empty()
            self._sort(waiting)
            free_memory()  # only now: the error held on to tensors

    def shrink(self, error: Exception) -> bool:
        """Halve the batch if ``error`` says that memory ran out, or the window if the batch is one row.

        Returns False for any other error, and where nothing is left to halve.
        """
        if not out_of_memory(error) or self.batch_size == self.decoder.step.width == 1:
            return False
        self.decoder.prefixes.clear()
        if self.batch_size > 1:
            self.batch_size //= 2
            logger.warning("out of memory; going on with batch size %d", self.batch_size)
        else:
            self.decoder = self.decoder.narrower()
            logger.warning("out of memory; going on with width %d", self.decoder.block_size)
        return True

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Raise UsageError, calling the prompt ``name``, for a request that can never be decoded here."""
        self.decoder.check(request, name)
        slots = self._slots(request)
        if self.max_slots is not None and slots > self.max_slots:
            raise UsageError(f"{name} may need {slots} cache slots, which is more than max_slots {self.max_slots}")

    def fits(self, jobs: Sequence[Job]) -> bool:
        """Whether the bounds let these jobs (at least one) be decoded together."""
        slots = len(jobs) * max(self._slots(job.request) for job in jobs)
        return len(jobs) <= self.batch_size and (self.max_slots is None or slots <= self.max_slots)

    def _sort(self, jobs: list[_Numbered]) -> None:
        jobs.sort(key=lambda job: (self._slots(job.request), -job.number))

    def _slots(self, request: Request) -> int:
        """How long its text may become, plus the window that follows the text."""
        most = len(request.prompt) + request.max_new_tokens
        return min(most, self.decoder.context or most) + self.decoder.step.span


def free_memory() -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()  # a cache and its layers refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
