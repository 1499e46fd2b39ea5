"""Keys and values that later prompts can start from: no token is computed twice while there is memory to remember it.

Shapes: T tokens of a piece, F numbers that all layers keep for a token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import torch

from cllm.decoding.cache import RowCache
from cllm.errors import UsageError

_Key = tuple[Hashable, int]  # scope and first token
DEFAULT_BYTES = 1 << 30


@dataclass(eq=False)
class _Piece:
    """Tokens that follow one another in every text that has the first of them here."""

    ids: np.ndarray  # [T]
    states_TF: torch.Tensor
    key: _Key
    siblings: dict[_Key, _Piece]  # where it stands under its key
    following: dict[_Key, _Piece] = field(default_factory=dict)


class Prefixes:
    """Keys and values by the token ids that they belong to, in a radix tree: what texts share is kept once.

    ``budget``: bytes that may be kept, 0 to keep nothing; what was used least recently goes first. What two texts have in
    common is found to the token. Texts of one ``scope`` never meet those of another; those of None are neither kept nor found.
    A copy of this is an empty one. Threads may share it. Raises UsageError for a negative budget.
    """

    def __init__(self, budget: int = DEFAULT_BYTES) -> None:
        if budget < 0:
            raise UsageError(f"prefix_cache must be >= 0 bytes, got {budget}")
        self.budget = budget
        self._lock = Lock()
        self._weights: object = None
        self.clear()

    def __reduce__(self) -> tuple[Callable[[int], Prefixes], tuple[int]]:
        return Prefixes, (self.budget,)

    def clear(self) -> None:
        """Forget everything."""
        self.bytes = 0  # that are kept
        self._form = RowCache()  # a cache without rows
        self._first: dict[_Key, _Piece] = {}
        self._order: OrderedDict[_Piece, None] = OrderedDict()  # least recently used first, so each before what it follows

    def expect(self, model: torch.nn.Module, changes: int = 0) -> None:
        """Forget everything if weights were trained, replaced or moved since the last call.

        An edit through ``.data`` is seen where :attr:`cllm.decoding.linear.Linears.changes` counts it. Elsewhere, and for an
        adapter switched on or off, call :meth:`clear`.
        """
        if not self.budget:
            return
        weights = [changes, *(_stamp(parameter) for parameter in model.parameters())]
        with self._lock:
            if weights != self._weights:
                self.clear()
            self._weights = weights

    def load(self, cache: RowCache, row: int, scope: Hashable, ids: Sequence[int] | np.ndarray) -> int:
        """Fill a row of ``cache``, which has the room reserved, with what is known of ``ids``: how many of its first tokens."""
        if not self.budget or scope is None:
            return 0
        with self._lock:
            known = [piece.states_TF[:count] for piece, count in self._path(scope, np.asarray(ids))]
            if known:
                cache.imitate(self._form, cache.room)
        start = 0
        for states_TF in known:
            cache.write(row, start, states_TF)
            start += len(states_TF)
        return start

    def store(self, cache: RowCache, row: int, scope: Hashable, ids: Sequence[int]) -> None:
        """Keep what the first slots of a row of ``cache`` hold, the tokens ``ids``; as many of them as the budget allows."""
        size = cache.token_bytes
        if not size or self.budget < size or scope is None:
            return
        text = np.asarray(ids)[: self.budget // size]
        with self._lock:
            path = self._path(scope, text)
            known = sum(count for _, count in path)
            if known == len(text):
                return
            self._form.imitate(cache, 0)
            pieces = [piece for piece, _ in path]
            if path and path[-1][1] < len(pieces[-1].ids):
                pieces[-1] = self._split(*path[-1])
            while self.bytes + (len(text) - known) * size > self.budget:
                self._drop_oldest()
            siblings = pieces[-1].following if pieces else self._first
            key = (scope, int(text[known]))
            new = siblings[key] = _Piece(text[known:], cache.read(row, known, len(text)), key, siblings)
            self.bytes += new.states_TF.nbytes
            self._touch([*pieces, new])

    def _path(self, scope: Hashable, ids: np.ndarray) -> list[tuple[_Piece, int]]:
        """The pieces that ``ids`` start with, from the first on, and how many tokens of each: all but for the last one."""
        path: list[tuple[_Piece, int]] = []
        start, pieces = 0, self._first
        while start < len(ids) and (piece := pieces.get((scope, int(ids[start])))):
            count = common(piece.ids, ids[start:])
            path.append((piece, count))
            start, pieces = start + count, piece.following if count == len(piece.ids) else {}
        self._touch([piece for piece, _ in path])
        return path

    def _touch(self, path: list[_Piece]) -> None:
        for piece in reversed(path):
            self._order[piece] = None
            self._order.move_to_end(piece)

    def _split(self, piece: _Piece, count: int) -> _Piece:
        """A new piece of the first ``count`` tokens of ``piece``, which then follows it."""
        states_TF = piece.states_TF
        head = _Piece(piece.ids[:count], states_TF[:count].clone(), piece.key, piece.siblings)
        piece.siblings[piece.key] = head
        piece.ids, piece.states_TF = piece.ids[count:], states_TF[count:].clone()
        piece.key, piece.siblings = (piece.key[0], int(piece.ids[0])), head.following
        head.following[piece.key] = piece
        self._touch([head])
        return head

    def _drop_oldest(self) -> None:
        piece, _ = self._order.popitem(last=False)
        del piece.siblings[piece.key]
        self.bytes -= piece.states_TF.nbytes


def _stamp(weight: torch.Tensor) -> tuple[object, ...]:
    """What changes with the numbers of a weight, and costs nothing to look at."""
    try:
        return weight.data_ptr(), weight._version
    except RuntimeError:  # it has no memory of its own, or counts no versions, as made in inference mode
        return id(weight), weight.dtype, weight.device


def common(one: Any, other: Any) -> int:
    """How many leading tokens two arrays of ids share."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
