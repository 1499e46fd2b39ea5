"""Continuous batching: requests wait in a queue, and one takes the place of every row that finishes.

The sliding window makes this cheap: each row has its own position, so a new row need not wait for the others.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from cllm.decoding.engine import JacobiDecoder, Request
from cllm.decoding.result import RowResult, Tally
from cllm.errors import UsageError, out_of_memory

logger = logging.getLogger(__name__)

LOOKAHEAD = 16  # batches of requests that are sorted by length together


@dataclass
class Queue:
    """Decodes any number of requests, ``batch_size`` rows at a time, in bounded memory.

    ``max_slots`` bounds the key-value cache: rows times the longest text that any of them may reach, in tokens. A batch
    then has fewer rows while long texts are in it. None: no bound but the batch size.
    """

    decoder: JacobiDecoder
    batch_size: int
    max_slots: int | None = None
    _waiting: list[tuple[int, Request]] = field(default_factory=list, init=False)  # the longest last

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be >= 1, got {self.batch_size}")

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, RowResult]]:
        """Results as their rows finish, each with the number of its request, counted from 0.

        Requests are read as they are needed. Out of memory, those not finished are decoded again, half as many together.
        Raises UsageError for a request that :meth:`check` refuses.
        """
        source = enumerate(requests)
        while True:
            inside: dict[int, tuple[int, Request]] = {}  # rows of the engine
            try:
                yield from self._flow(source, inside)
                return
            except Exception as error:
                if not self.shrink(error):
                    raise
            self._waiting += inside.values()
            self._sort()
            free_memory()  # what the error held on to is gone by now

    def _flow(self, source: Iterator[tuple[int, Request]], inside: dict[int, tuple[int, Request]]) -> Iterator[tuple[int, RowResult]]:
        tally = Tally(self.decoder.eos_ids.tolist())
        fed = 0
        finished: list[int] = []

        def feed(running: list[int]) -> list[Request]:
            nonlocal fed
            finished.extend(inside.keys() - set(running) - set(finished))
            taken = self._take(source, [inside[row][1] for row in running])
            for item in taken:
                inside[fed] = item
                fed += 1
            return [request for _, request in taken]

        def results() -> Iterator[tuple[int, RowResult]]:
            for row in sorted(finished):
                number, request = inside[row]
                result = tally.take(row, request.max_new_tokens)
                del inside[row]
                yield number, result
            finished.clear()

        for iteration in self.decoder.flow(feed):
            yield from results()
            tally.add(iteration)
        yield from results()

    def shrink(self, error: Exception) -> bool:
        """Halve the batch if ``error`` says that memory ran out, and where one row was too many, the window.

        False where it says something else, or nothing is left to halve.
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

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether the bounds let these requests (at least one) be decoded together."""
        slots = len(requests) * max(map(self._slots, requests))
        return len(requests) <= self.batch_size and (self.max_slots is None or slots <= self.max_slots)

    def _take(self, source: Iterator[tuple[int, Request]], running: list[Request]) -> list[tuple[int, Request]]:
        """The next requests that there is room for beside those running, the longest first, so that none is left over."""
        if len(running) >= self.batch_size:
            return []
        if len(self._waiting) < self.batch_size:
            for number, request in islice(source, LOOKAHEAD * self.batch_size):
                self.check(request, f"prompt {number}")
                self._waiting.append((number, request))
            self._sort()
        taken: list[tuple[int, Request]] = []
        while self._waiting:
            beside = [*running, *(request for _, request in taken)]
            if not self.fits([*beside, self._waiting[-1][1]]):
                break
            taken.append(self._waiting.pop())
        return taken

    def _sort(self) -> None:
        self._waiting.sort(key=lambda item: (self._slots(item[1]), -item[0]))

    def _slots(self, request: Request) -> int:
        """How long its text may become, the window behind it included."""
        most = len(request.prompt) + request.max_new_tokens
        return min(most, self.decoder.context or most) + self.decoder.step.span


def free_memory() -> None:
    """Give back what caches took that nobody uses any more."""
    gc.collect()  # a cache and its layers point at each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
