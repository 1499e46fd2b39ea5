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
    """

    def __init__(self) -> None:
        self.row_layers: list[RowCacheLayer] = []
        self.length = 0  # slots that the next forward sees
        self.stride = 0  # slots that each row has, slot -1 included
        self.flat_slots = torch.empty(0, dtype=torch.long)  # where the next forward writes, over all rows
        super().__init__(layer_class_to_replicate=cast(Any, self._new_layer))

    def place(self, slots_BT: torch.Tensor, length: int) -> None:
        """Say where the next forward writes (``slots_BT``, int64, -1 = nowhere) and that it sees slots 0 .. length - 1."""
        stride = -(-(length + 1) // GROWTH) * GROWTH
        stride = max(stride, self.stride)
        rows = torch.arange(len(slots_BT), device=slots_BT.device)[:, None]
        self.stride, self.length = stride, length
        self.flat_slots = (rows * stride + slots_BT + 1).flatten()

    def select(self, rows: torch.Tensor) -> None:
        """Keep only the given rows (int64 indices), in that order."""
        for layer in self.row_layers:
            layer.select(rows)

    def put(self, other: RowCache, free: torch.Tensor) -> None:
        """Take in the rows of ``other``: in the place of the free ones first (int64 indices), then behind the last.

        ``other`` is used up.
        """
        if not self.row_layers:
            self.row_layers, self.layers = other.row_layers, other.layers
            for layer in self.row_layers:
                layer.cache = self
        else:
            for layer, theirs in zip(self.row_layers, other.row_layers, strict=True):
                layer.put(theirs, free)
        self.stride = max(self.stride, other.stride)

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

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        B, H, _, D = key_states.shape
        self.keys = key_states.new_zeros(B, 0, H, D)
        self.values = value_states.new_zeros(B, 0, H, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write [B, H, T, D] at the placed slots and return the visible slots as [B, H, length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = keys = self._write(self.keys, key_states)
        self.values = values = self._write(self.values, value_states)
        visible = slice(1, 1 + self.cache.length)
        return keys[:, visible].transpose(1, 2), values[:, visible].transpose(1, 2)

    def _write(self, store: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
        assert store is not None  # lazy_initialization has made it
        missing = self.cache.stride - store.shape[1]
        if missing > 0:
            store = torch.cat([store, store.new_zeros(store.shape[0], missing, *store.shape[2:])], dim=1)
        store.view(-1, *store.shape[2:]).index_copy_(0, self.cache.flat_slots, states.transpose(1, 2).flatten(0, 1))
        return store

    def select(self, rows: torch.Tensor) -> None:
        assert self.keys is not None and self.values is not None  # a forward has filled the cache
        self.keys, self.values = self.keys[rows], self.values[rows]

    def put(self, other: RowCacheLayer, free: torch.Tensor) -> None:
        assert self.keys is not None and self.values is not None and other.keys is not None and other.values is not None
        self.keys = put_rows(self.keys, other.keys, free)
        self.values = put_rows(self.values, other.values, free)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def put_rows(mine: torch.Tensor, theirs: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """``mine`` [B, S, ...] with the rows of ``theirs`` [B', S', ...] in the free places, and behind when those run out.

    The shorter of S and S' is filled up with zeros. ``mine`` is used up: it is written to where that saves a copy.
    """
    if mine.dim() > 1:
        longest = max(mine.shape[1], theirs.shape[1])
        mine, theirs = (_lengthen(rows, longest) for rows in (mine, theirs))
    replaced = min(len(free), len(theirs))
    mine.index_copy_(0, free[:replaced], theirs[:replaced])
    return mine if replaced == len(theirs) else torch.cat([mine, theirs[replaced:]])


def _lengthen(rows: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - rows.shape[1]
    return torch.cat([rows, rows.new_zeros(len(rows), missing, *rows.shape[2:])], dim=1) if missing else rows
