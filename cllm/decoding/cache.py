"""A key-value cache whose rows advance independently and that is never cropped.

Shapes: B rows, H key-value heads, T tokens of a forward, S slots, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 256  # slots added at least when a layer runs out of them


class RowCache(Cache):
    """Every token's keys and values go to the slot that the caller names before the forward.

    A slot may be written again and again: decoding places a window at its positions, so a later window overwrites what
    wrong guesses left behind before any mask lets a query see it. Hence no cropping, and no common length of the rows.
    Slot -1 takes the padding: it can be written and is never returned.

    A forward may be about the first rows of the cache only. Keys and values stay where they are in memory while the room
    that :meth:`reserve` made suffices.
    """

    def __init__(self) -> None:
        self.row_layers: list[RowCacheLayer] = []
        self.room = 0  # rows that a new layer has at least
        self.first = 0  # row of the next forward's first one
        self.rows = 0  # rows of the next forward
        self.length = 0  # slots that it sees
        self.stride = 0  # slots that each row has, slot -1 included
        self.flat_slots = torch.empty(0, dtype=torch.long)  # where it writes, over all rows
        super().__init__(layer_class_to_replicate=cast(Any, self._new_layer))

    def place(self, slots_BT: torch.Tensor, length: int, first: int = 0) -> None:
        """Say where the next forward writes (``slots_BT``, int64, -1 = nowhere) and that it sees slots 0 .. length - 1.

        It is about row ``first`` and those after it.
        """
        self.first, self.rows, self.length = first, len(slots_BT), length
        if length >= self.stride:
            self.stride = -(-(length + 1) // GROWTH) * GROWTH
        if self.row_layers and self.row_layers[-1].lacks(first + self.rows, self.stride):  # the last to grow
            self.reserve(first + self.rows, self.stride - 1)
        rows = torch.arange(self.rows, device=slots_BT.device)[:, None]
        self.flat_slots = (rows * self.stride + slots_BT + 1).flatten()

    def reserve(self, rows: int, length: int) -> None:
        """Make room for so many rows, and for slots 0 .. length - 1 of each."""
        self.room, self.stride = max(self.room, rows), max(self.stride, length + 1)
        for layer in self.row_layers:
            layer.reserve(rows, self.stride)

    def put(self, other: RowCache, places: torch.Tensor, rows: int) -> None:
        """Take in the rows of ``other`` at these places (int64 indices) among ``rows``. ``other`` is used up."""
        if other.length >= self.stride:
            self.stride = other.stride
        self.imitate(other, 0)
        for layer, theirs in zip(self.row_layers, other.row_layers, strict=True):
            layer.put(theirs, places, rows)
            theirs.release()  # so that one layer is there twice, never all

    def imitate(self, other: RowCache, rows: int) -> None:
        """Make the layers that ``other`` has and this one lacks, with so many empty rows."""
        while len(self.row_layers) < len(other.row_layers):
            self.layers.append(self._new_layer())
        for layer, theirs in zip(self.row_layers, other.row_layers, strict=True):
            if not layer.is_initialized:
                layer.open(*theirs.stores, rows)

    def keep(self, rows: torch.Tensor) -> None:
        """Move these rows (int64 indices) to the front, in that order."""
        for layer in self.row_layers:
            layer.keep(rows)

    @property
    def token_bytes(self) -> int:
        """What the keys and values of one token take."""
        return sum(store.shape[2:].numel() * store.element_size() for store in self._stores)

    def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """A copy [T, F] of what slots start .. end - 1 of a row hold, of each token the keys and values of all layers."""
        parts = [store[row, 1 + start : 1 + end].flatten(1) for store in self._stores]
        return torch.cat([part.to(parts[0].device) for part in parts], dim=1)

    def write(self, row: int, start: int, states_TF: torch.Tensor) -> None:
        """Put what :meth:`read` gave into slots start, ... of a row."""
        stores = self._stores
        parts = states_TF.split([store.shape[2:].numel() for store in stores], dim=1)
        for store, part_TF in zip(stores, parts, strict=True):
            store[row, 1 + start : 1 + start + len(part_TF)] = part_TF.unflatten(1, store.shape[2:])

    def copy(self, row: int, to: int, start: int, end: int) -> None:
        """Put what slots start .. end - 1 of a row hold into those of row ``to``."""
        slots = slice(1 + start, 1 + end)
        for store in self._stores:
            store[to, slots] = store[row, slots]

    @property
    def _stores(self) -> list[torch.Tensor]:
        return [store for layer in self.row_layers for store in layer.stores]

    def _new_layer(self) -> RowCacheLayer:
        self.row_layers.append(RowCacheLayer(self))
        return self.row_layers[-1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No common length exists; positions are always passed explicitly."""
        return 0


class RowCacheLayer(CacheLayerMixin):
    """Keys and values of one layer as [B, 1 + S, H, D]; element 0 of the second axis is slot -1."""

    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache
        self._of: tuple[int, int, int] | None = None  # the rows and the length that the views are about
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []  # of keys and values, see _view

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows = max(len(key_states), self.cache.room)
        self.open(key_states.transpose(1, 2), value_states.transpose(1, 2), rows)

    def open(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> None:
        """Make room for so many rows, with heads like those of ``keys`` and ``values`` [B, T, H, D]."""
        self.keys = keys.new_zeros(rows, self.cache.stride, *keys.shape[2:])
        self.values = values.new_zeros(rows, self.cache.stride, *values.shape[2:])
        self.is_initialized = True

    @property
    def stores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values."""
        assert self.keys is not None and self.values is not None  # a forward has filled them
        return self.keys, self.values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write [B, H, T, D] at the placed slots and return the visible slots as [B, H, length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        of = (self.cache.first, self.cache.rows, self.cache.length)
        if self._of != of or torch.compiler.is_compiling():  # most forwards are about what the last one was about
            self._of, self._views = of, [self._view(store) for store in self.stores]
        for (flat, _), states in zip(self._views, (key_states, value_states)):
            flat.index_copy_(0, self.cache.flat_slots, states.transpose(1, 2).flatten(0, 1))
        return self._views[0][1], self._views[1][1]

    def _view(self, store: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a forward with their slots one after the other, and what it sees of them."""
        rows = store[self.cache.first : self.cache.first + self.cache.rows]
        return rows.view(-1, *rows.shape[2:]), rows[:, 1 : 1 + self.cache.length].transpose(1, 2)

    def lacks(self, rows: int, stride: int) -> bool:
        return self.keys is not None and (len(self.keys) < rows or self.keys.shape[1] < stride)

    def reserve(self, rows: int, stride: int) -> None:
        self._forget_views()  # they would keep what is replaced, in all layers at once
        self.keys, self.values = (enlarge(store, rows, stride) for store in self.stores)

    def release(self) -> None:
        """Give the memory back; the layer is used up."""
        self._forget_views()
        self.keys = self.values = None

    def _forget_views(self) -> None:
        self._of, self._views = None, []

    def put(self, other: RowCacheLayer, places: torch.Tensor, rows: int) -> None:
        self.reserve(rows, self.cache.stride)
        used = slice(1 + other.cache.length)
        for mine, theirs in zip(self.stores, other.stores):
            mine[:, used].index_copy_(0, places, theirs[:, used])

    def keep(self, rows: torch.Tensor) -> None:
        for store in self.stores:
            store[: len(rows)] = store[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def enlarge(store: torch.Tensor, rows: int, columns: int = 0) -> torch.Tensor:
    """``store`` [B, S, ...] itself if it has so many rows and columns, else a copy that has, filled up with zeros."""
    if len(store) >= rows and (store.dim() == 1 or store.shape[1] >= columns):
        return store
    shape = list(store.shape)
    shape[0] = max(shape[0], rows)
    if store.dim() > 1:
        shape[1] = max(shape[1], columns)
    larger = store.new_zeros(shape)
    larger[tuple(map(slice, store.shape))] = store
    return larger
