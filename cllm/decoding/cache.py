"""A key-value cache that is never cropped and whose rows advance independently.

Shapes: B rows, H key-value heads, T tokens of a forward, S slots, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 256  # the number of slots per row is a multiple of this


class RowCache(Cache):
    """Before each forward the caller says which slot each token's keys and values go to.

    Slots can be rewritten. Decoding writes a window at its own positions, so the next window overwrites the entries of wrong
    guesses before any mask shows them. The cache therefore needs no cropping, and its rows need no common length.
    Slot -1 takes the padding: it can be written and is never returned.

    A forward may cover only some of the rows. Keys and values keep their addresses while they fit into the space that
    :meth:`reserve` allocated.
    """

    def __init__(self) -> None:
        self.row_layers: list[RowCacheLayer] = []
        self.room = 0  # least number of rows in a new layer
        self.first = 0  # first row of the next forward
        self.rows = 0  # number of rows of the next forward
        self.length = 0  # number of slots it sees
        self.stride = 0  # slots per row, slot -1 included
        self.flat_slots = torch.empty(0, dtype=torch.long)  # slots it writes, counted over all its rows
        super().__init__(layer_class_to_replicate=cast(Any, self._new_layer))

    def place(self, slots_BT: torch.Tensor, length: int, first: int = 0) -> None:
        """Set the slots that the next forward writes (``slots_BT``, int64, -1 for padding) and sees (0 .. length - 1).

        The forward covers the rows from ``first`` on.
        """
        self.first, self.rows, self.length = first, len(slots_BT), length
        if length >= self.stride:
            self.stride = -(-(length + 1) // GROWTH) * GROWTH
        if self.row_layers and self.row_layers[-1].is_smaller(first + self.rows, self.stride):  # the last layer to grow
            self.reserve(first + self.rows, self.stride - 1)
        rows = torch.arange(self.rows, device=slots_BT.device)[:, None]
        self.flat_slots = (rows * self.stride + slots_BT + 1).flatten()

    def reserve(self, rows: int, length: int) -> None:
        """Allocate at least ``rows`` rows with slots 0 .. length - 1."""
        self.room, self.stride = max(self.room, rows), max(self.stride, length + 1)
        for layer in self.row_layers:
            layer.reserve(rows, self.stride)

    def move_in(self, other: RowCache, places: torch.Tensor, rows: int) -> None:
        """Move the rows of ``other`` to these row indices (int64) of this cache, with room for ``rows``; consumes ``other``."""
        if other.length >= self.stride:
            self.stride = other.stride
        self.match_layers(other, 0)
        for layer, theirs in zip(self.row_layers, other.row_layers, strict=True):
            layer.copy_from(theirs, places, rows)
            theirs.release()  # at most one layer is held twice

    def match_layers(self, other: RowCache, rows: int) -> None:
        """Add the layers that only ``other`` has, with ``rows`` empty rows."""
        while len(self.row_layers) < len(other.row_layers):
            self.layers.append(self._new_layer())
        for layer, theirs in zip(self.row_layers, other.row_layers, strict=True):
            if not layer.is_initialized:
                layer.allocate(*theirs.stores, rows)

    def compact(self, rows: torch.Tensor) -> None:
        """Move these rows (int64 indices) to the front, in that order."""
        for layer in self.row_layers:
            layer.compact(rows)

    @property
    def token_bytes(self) -> int:
        """Bytes that the keys and values of one token take."""
        return sum(store.shape[2:].numel() * store.element_size() for store in self._stores)

    def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """A copy [T, F] of slots start .. end - 1 of a row; F: each token's keys and values of all layers, flattened."""
        parts = [store[row, 1 + start : 1 + end].flatten(1) for store in self._stores]
        return torch.cat([part.to(parts[0].device) for part in parts], dim=1)

    def write(self, row: int, start: int, states_TF: torch.Tensor) -> None:
        """Write what :meth:`read` returned to the slots of a row from ``start`` on."""
        stores = self._stores
        parts = states_TF.split([store.shape[2:].numel() for store in stores], dim=1)
        for store, part_TF in zip(stores, parts, strict=True):
            store[row, 1 + start : 1 + start + len(part_TF)] = part_TF.unflatten(1, store.shape[2:])

    def copy(self, row: int, to: int, start: int, end: int) -> None:
        """Copy slots start .. end - 1 of a row to row ``to``."""
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
        """0: the rows have no common length, and positions are always passed explicitly."""
        return 0


class RowCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, each [B, 1 + S, H, D]; index 0 of the second axis is slot -1."""

    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache
        self._viewed: tuple[int, int, int] | None = None  # first row, number of rows and length of the views
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []  # of keys and of values, see _view

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows = max(len(key_states), self.cache.room)
        self.allocate(key_states.transpose(1, 2), value_states.transpose(1, 2), rows)

    def allocate(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> None:
        """Allocate ``rows`` empty rows, with heads like those of ``keys`` and ``values`` [B, T, H, D]."""
        self.keys = keys.new_zeros(rows, self.cache.stride, *keys.shape[2:])
        self.values = values.new_zeros(rows, self.cache.stride, *values.shape[2:])
        self.is_initialized = True

    @property
    def stores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [B, 1 + S, H, D]."""
        assert self.keys is not None and self.values is not None  # a forward has filled them
        return self.keys, self.values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write keys and values [B, H, T, D] to the placed slots; returns the visible slots of both, [B, H, length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        viewed = (self.cache.first, self.cache.rows, self.cache.length)
        if self._viewed != viewed or torch.compiler.is_compiling():  # consecutive forwards mostly share their views
            self._viewed, self._views = viewed, [self._view(store) for store in self.stores]
        for (flat, _), states in zip(self._views, (key_states, value_states)):
            flat.index_copy_(0, self.cache.flat_slots, states.transpose(1, 2).flatten(0, 1))
        return self._views[0][1], self._views[1][1]

    def _view(self, store: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a forward with all their slots on one axis, to write to, and the slots it sees, to return."""
        rows = store[self.cache.first : self.cache.first + self.cache.rows]
        return rows.view(-1, *rows.shape[2:]), rows[:, 1 : 1 + self.cache.length].transpose(1, 2)

    def is_smaller(self, rows: int, stride: int) -> bool:
        return self.keys is not None and (len(self.keys) < rows or self.keys.shape[1] < stride)

    def reserve(self, rows: int, stride: int) -> None:
        self._clear_views()  # they would keep the replaced tensors alive
        self.keys, self.values = (enlarge(store, rows, stride) for store in self.stores)

    def release(self) -> None:
        """Free the memory; the layer cannot be used any more."""
        self._clear_views()
        self.keys = self.values = None

    def _clear_views(self) -> None:
        self._viewed, self._views = None, []

    def copy_from(self, other: RowCacheLayer, places: torch.Tensor, rows: int) -> None:
        self.reserve(rows, self.cache.stride)
        used = slice(1 + other.cache.length)
        for mine, theirs in zip(self.stores, other.stores):
            mine[:, used].index_copy_(0, places, theirs[:, used])

    def compact(self, rows: torch.Tensor) -> None:
        for store in self.stores:
            store[: len(rows)] = store[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def enlarge(store: torch.Tensor, rows: int, columns: int = 0) -> torch.Tensor:
    """``store`` [B, S, ...] itself if it is large enough, else a copy that is, padded with zeros."""
    if len(store) >= rows and (store.dim() == 1 or store.shape[1] >= columns):
        return store
    shape = list(store.shape)
    shape[0] = max(shape[0], rows)
    if store.dim() > 1:
        shape[1] = max(shape[1], columns)
    larger = store.new_zeros(shape)
    larger[tuple(map(slice, store.shape))] = store
    return larger
