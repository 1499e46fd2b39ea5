"""Rows that are decoded together, with their cache, in buffers that a captured step can point at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from itertools import count, islice
from typing import Any

import torch

from cllm.decoding.cache import RowCache
from cllm.decoding.rows import Rows

Running = dict[int, tuple[int, int]]  # rows, by number: their place in the batch, and where their window begins


class Batch:
    """Rows come and go; the buffers stay where they are in memory as long as there is room in them.

    A step is about the first ``size`` places. Those of finished rows are free.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows, self.cache = rows, RowCache()
        self.captured: OrderedDict[Hashable, Any] = OrderedDict()  # what holds only while the buffers stay where they are
        self.resize(len(rows))

    def resize(self, size: int) -> None:
        self.size, self.live = size, self.rows.head(size)

    def clear(self) -> None:
        self.rows.free(0)
        self.resize(0)

    def drop(self, numbers: Collection[int]) -> None:
        """End these rows, where they are still running."""
        self.live.done_B.logical_or_(torch.isin(self.live.ids_B, torch.tensor([*numbers], device=self.live.ids_B.device)))

    def look(self) -> tuple[Running, Running]:
        """The rows still running, and those that have ended in places still theirs. The host waits for the device here."""
        facts = torch.stack([self.live.ids_B, self.live.start_B, self.live.done_B.long()], dim=1).tolist()
        running, ended = ({row: (place, start) for place, (row, start, done) in enumerate(facts) if done == of} for of in (False, True))
        return running, ended

    def useful(self) -> int:
        """How many leading tokens of the windows are worth a forward, for some running row. The host waits here, too."""
        return int(self.live.useful_B.masked_fill(self.live.done_B, 1).amax())

    def put(self, other: Batch, running: Running, slots: int, fixed: bool) -> None:
        """Take in the rows of ``other``, which is used up, in free places first and then behind the last.

        ``slots``: how far the texts may reach. ``fixed``: make room in the cache for all of them now, and leave it where it is.
        """
        taken = {place for place, _ in running.values()}
        places = list(islice((place for place in count() if place not in taken), len(other.rows)))
        used = max(self.size if running else 0, places[-1] + 1)
        room = max(used, len(self.rows))
        if self.rows.reserve(room, slots):
            self.captured.clear()
        to = torch.tensor(places, device=self.rows.ids_B.device)
        self.rows.put(other.rows, to)
        if fixed:
            self.cache.reserve(room, slots)
        if running or fixed:
            self.cache.put(other.cache, to, room)
        else:  # nobody else's keys are left
            self.cache = other.cache
        self.resize(used)

    def keep(self, running: Running) -> None:
        """Move the rows still running to the front."""
        rows = torch.tensor([place for place, _ in running.values()], device=self.rows.ids_B.device)
        self.rows.keep(rows)
        self.cache.keep(rows)
