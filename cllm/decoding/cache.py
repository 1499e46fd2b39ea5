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
        self.rows = 0  # rows of the next forward
        self.length = 0  # slots that it sees
        self.stride = 0  # slots that each row has, slot -1 included
        self.flat_slots = torch.empty(0, dtype=torch.long)  # where it writes, over all rows
        super().__init__(layer_class_to_replicate=cast(Any, self._new_layer))

    def place(self, slots_BT: torch.Tensor, length: int) -> None:
        """Say where the next forward writes (``slots_BT``, int64, -1 = nowhere) and that it sees slots 0 .. length - 1."""
        self.rows, self.length = len(slots_BT), length
        if length >= self.stride:
            self.stride = -(-(length + 1) // GROWTH) * GROWTH
        if self.row_layers and self.row_layers[-1].lacks(self.rows, self.stride):  # the last to grow
            self.reserve(self.rows, self.stride - 1)
        rows = torch.arange(self.rows, device=slots_BT.device)[:, None]
        self.flat_slots = (rows * self.stride + slots_BT + 1).flatten()

    def reserve(self, rows: int, length: int) -> None:
        """Make room for so many rows, and for slots 0 .. length - 1 of each."""
        self.stride = max(self.stride, length + 1)
        for layer in self.row_layers:
            layer.reserve(rows, self.stride)

    def put(self, other: RowCache, places: torch.Tensor, rows: int) -> None:
        """Take in the rows of ``other`` at these places (int64 indices) among ``rows``. ``other`` is used up."""
        while len(self.row_layers) < len(other.row_layers):
            self.layers.append(self._new_layer())
        if other.length >= self.stride:
            self.stride = other.stride
        for layer, theirs in zip(self.row_layers, other.row_layers, strict=True):
            layer.put(theirs, places, rows)
            theirs.release()  # so that one layer is there twice, never all

    def keep(self, rows: torch.Tensor) -> None:
        """Move these rows (int64 indices) to the front, in that order."""
        for layer in self.row_layers:
            layer.keep(rows)

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
        self._of: tuple[int, int] | None = None  # the rows and the length that the views are about
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []  # of keys and values, see _view

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        B, H, _, D = key_states.shape
        self.keys = key_states.new_zeros(B, self.cache.stride, H, D)
        self.values = value_states.new_zeros(B, self.cache.stride, H, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write [B, H, T, D] at the placed slots and return the visible slots as [B, H, length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        of = (self.cache.rows, self.cache.length)
        if self._of != of or torch.compiler.is_compiling():  # most forwards are about what the last one was about
            self._of, self._views = of, [self._view(self.keys), self._view(self.values)]
        for (flat, _), states in zip(self._views, (key_states, value_states)):
            flat.index_copy_(0, self.cache.flat_slots, states.transpose(1, 2).flatten(0, 1))
        return self._views[0][1], self._views[1][1]

    def _view(self, store: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A store with its slots of all rows one after the other, and what a forward sees of it."""
        assert store is not None  # lazy_initialization has made it
        visible = store[: self.cache.rows, 1 : 1 + self.cache.length].transpose(1, 2)
        return store.view(-1, *store.shape[2:]), visible

    def lacks(self, rows: int, stride: int) -> bool:
        return self.keys is not None and (len(self.keys) < rows or self.keys.shape[1] < stride)

    def reserve(self, rows: int, stride: int) -> None:
        assert self.keys is not None and self.values is not None  # lazy_initialization has made them
        self._forget_views()  # they would keep what is replaced, in all layers at once
        self.keys, self.values = enlarge(self.keys, rows, stride), enlarge(self.values, rows, stride)

    def release(self) -> None:
        """Give the memory back; the layer is used up."""
        self._forget_views()
        self.keys = self.values = None

    def _forget_views(self) -> None:
        self._of, self._views = None, []

    def put(self, other: RowCacheLayer, places: torch.Tensor, rows: int) -> None:
        assert other.keys is not None and other.values is not None  # a forward has filled it
        if not self.is_initialized:
            self.lazy_initialization(other.keys[:0].transpose(1, 2), other.values[:0].transpose(1, 2))
        self.reserve(rows, self.cache.stride)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            assert mine is not None
            used = slice(1 + other.cache.length)
            mine[:, used].index_copy_(0, places, theirs[:, used])

    def keep(self, rows: torch.Tensor) -> None:
        for store in (self.keys, self.values):
            assert store is not None
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
