"""The order in which a training run sees its examples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from typing import Protocol

from torch.utils.data import Sampler

WINDOW = 16  # batches whose examples are sorted by length together


class Measurable(Sized, Protocol):
    """A dataset that knows the length of an example without building it."""

    def length(self, index: int) -> int: ...


class LengthGroupedSampler(Sampler[int]):
    """Every example once, in batches of similar length, which keeps padding low.

    The order depends only on seed and ``epoch``. Within a window of WINDOW batches, examples are sorted by length and batches
    shuffled; lengths are read window by window.
    """

    def __init__(self, dataset: Measurable, batch_size: int, seed: int) -> None:
        self.dataset, self.batch_size, self.seed, self.epoch = dataset, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = draw.sample(range(len(self)), len(self))
        window = WINDOW * self.batch_size
        for start in range(0, len(order), window):
            indices = sorted(order[start : start + window], key=self.dataset.length)
            batches = [indices[at : at + self.batch_size] for at in range(0, len(indices), self.batch_size)]
            short = batches.pop() if len(batches[-1]) < self.batch_size else []  # only the epoch's last batch may be short
            for batch in draw.sample(batches, len(batches)):
                yield from batch
            yield from short
