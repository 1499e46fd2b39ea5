"""The rows being decoded together and their cache, in buffers whose addresses captured steps can rely on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from itertools import count, islice
from typing import Any

import torch

from cllm.decoding.cache import RowCache
from cllm.decoding.rows import Rows

Places = dict[int, tuple[int, int]]  # row number -> its index in the batch, and where its window begins


class Batch:
    """Rows join and leave; the buffers keep their addresses until they have to grow.

    A step processes the first ``size`` places. The places of finished rows are free.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows, self.cache = rows, RowCache()
        self.captured: OrderedDict[Hashable, Any] = OrderedDict()  # valid only while the buffers keep their addresses
        self.resize(len(rows))

    def resize(self, size: int) -> None:
        self.size, self.live = size, self.rows.head(size)

    def clear(self) -> None:
        self.rows.free(0)
        self.resize(0)

    def cancel(self, numbers: Collection[int]) -> None:
        """End those of these rows that are still running."""
        self.live.done_B.logical_or_(torch.isin(self.live.ids_B, torch.tensor([*numbers], device=self.live.ids_B.device)))

    def poll(self) -> tuple[Places, Places]:
        """The rows still running, and the finished ones whose places are not reused yet. Synchronises with the device."""
        states = torch.stack([self.live.ids_B, self.live.start_B, self.live.done_B.long()], dim=1).tolist()
        places: tuple[Places, Places] = {}, {}
        for place, (row, start, done) in enumerate(states):
            places[done][row] = place, start
        return places

    def useful(self) -> int:
        """How many leading window tokens are worth computing for at least one running row. Synchronises with the device."""
        return int(self.live.useful_B.masked_fill(self.live.done_B, 1).amax())

    def merge(self, other: Batch, running: Places, slots: int, fixed: bool) -> None:
        """Move the rows of ``other`` here, into free places first, then after the last row; consumes ``other``.

        ``slots``: how far the texts may reach. ``fixed``: reserve all of the cache now, so that it never moves.
        """
        taken = {place for place, _ in running.values()}
        places = list(islice((place for place in count() if place not in taken), len(other.rows)))
        used = max(self.size if running else 0, places[-1] + 1)
        room = max(used, len(self.rows))
        if self.rows.reserve(room, slots):
            self.captured.clear()
        to = torch.tensor(places, device=self.rows.ids_B.device)
        self.rows.write(other.rows, to)
        if fixed:
            self.cache.reserve(room, slots)
        if running or fixed:
            self.cache.move_in(other.cache, to, room)
        else:  # no other row needs its keys
            self.cache = other.cache
        self.resize(used)

    def compact(self, running: Places) -> None:
        """Move the running rows to the front."""
        rows = torch.tensor([place for place, _ in running.values()], device=self.rows.ids_B.device)
        self.rows.compact(rows)
        self.cache.compact(rows)
