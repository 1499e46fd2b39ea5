"""A cache of keys and values, so that prompts are not recomputed from where they start like an earlier text.

Shapes: T tokens of a node, F numbers per token (keys and values of all layers).
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
class _Node:
    """A node of the radix tree: a run of tokens without a branch."""

    ids: np.ndarray  # [T]
    states_TF: torch.Tensor
    key: _Key
    siblings: dict[_Key, _Node]  # the parent's children, this node under ``key`` among them
    children: dict[_Key, _Node] = field(default_factory=dict)


class PrefixCache:
    """Keys and values of texts in a radix tree over token ids, which stores a common prefix once and finds it to the token.

    ``budget``: bytes to keep at most, 0 for none; the least recently used are dropped first. Texts share prefixes only within
    a ``scope``; those with scope None are neither stored nor found. Thread-safe. A copy of a cache is empty.
    Raises UsageError for a negative budget.
    """

    def __init__(self, budget: int = DEFAULT_BYTES) -> None:
        if budget < 0:
            raise UsageError(f"prefix_cache must be >= 0 bytes, got {budget}")
        self.budget = budget
        self._lock = Lock()
        self._weights: object = None
        self.clear()

    def __reduce__(self) -> tuple[Callable[[int], PrefixCache], tuple[int]]:
        return PrefixCache, (self.budget,)

    def clear(self) -> None:
        """Drop everything."""
        self.bytes = 0  # in use
        self._layers = RowCache()  # the layers of the caches stored, without rows
        self._roots: dict[_Key, _Node] = {}
        self._order: OrderedDict[_Node, None] = OrderedDict()  # least recently used first, so children precede their parents

    def check_weights(self, model: torch.nn.Module, changes: int = 0) -> None:
        """Drop everything if weights were trained, replaced or moved since the last call.

        Edits through ``.data`` are noticed only where ``changes``, :attr:`cllm.decoding.linear.LinearPatch.changes`, counts
        them. Otherwise, and after switching an adapter on or off, call :meth:`clear`.
        """
        if not self.budget:
            return
        weights = [changes, *(_stamp(parameter) for parameter in model.parameters())]
        with self._lock:
            if weights != self._weights:
                self.clear()
            self._weights = weights

    def load(self, cache: RowCache, row: int, scope: Hashable, ids: Sequence[int] | np.ndarray) -> int:
        """Fill a row of ``cache``, whose space is reserved, with the longest known prefix of ``ids``; returns its length."""
        if not self.budget or scope is None:
            return 0
        with self._lock:
            known = [node.states_TF[:count] for node, count in self._path(scope, np.asarray(ids))]
            if known:
                cache.match_layers(self._layers, cache.room)
        start = 0
        for states_TF in known:
            cache.write(row, start, states_TF)
            start += len(states_TF)
        return start

    def store(self, cache: RowCache, row: int, scope: Hashable, ids: Sequence[int]) -> None:
        """Store the first slots of a row of ``cache``, which hold the tokens ``ids``, as far as the budget allows."""
        size = cache.token_bytes
        if not size or self.budget < size or scope is None:
            return
        text = np.asarray(ids)[: self.budget // size]
        with self._lock:
            path = self._path(scope, text)
            known = sum(count for _, count in path)
            if known == len(text):
                return
            self._layers.match_layers(cache, 0)
            nodes = [node for node, _ in path]
            if path and path[-1][1] < len(nodes[-1].ids):
                nodes[-1] = self._split(*path[-1])
            while self.bytes + (len(text) - known) * size > self.budget:
                self._drop_oldest()
            siblings = nodes[-1].children if nodes else self._roots
            key = (scope, int(text[known]))
            new = siblings[key] = _Node(text[known:], cache.read(row, known, len(text)), key, siblings)
            self.bytes += new.states_TF.nbytes
            self._touch([*nodes, new])

    def _path(self, scope: Hashable, ids: np.ndarray) -> list[tuple[_Node, int]]:
        """The nodes along ``ids`` from the root, and how many tokens of each match: all of them but in the last node."""
        path: list[tuple[_Node, int]] = []
        start, nodes = 0, self._roots
        while start < len(ids) and (node := nodes.get((scope, int(ids[start])))):
            count = common_length(node.ids, ids[start:])
            path.append((node, count))
            start, nodes = start + count, node.children if count == len(node.ids) else {}
        self._touch([node for node, _ in path])
        return path

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._order[node] = None
            self._order.move_to_end(node)

    def _split(self, node: _Node, count: int) -> _Node:
        """Split off the first ``count`` tokens of ``node`` as its new parent, which is returned."""
        states_TF = node.states_TF
        head = _Node(node.ids[:count], states_TF[:count].clone(), node.key, node.siblings)
        node.siblings[node.key] = head
        node.ids, node.states_TF = node.ids[count:], states_TF[count:].clone()
        node.key, node.siblings = (node.key[0], int(node.ids[0])), head.children
        head.children[node.key] = node
        self._touch([head])
        return head

    def _drop_oldest(self) -> None:
        node, _ = self._order.popitem(last=False)
        del node.siblings[node.key]
        self.bytes -= node.states_TF.nbytes


def _stamp(weight: torch.Tensor) -> tuple[object, ...]:
    """A value that changes with the weight and takes no time to compute."""
    try:
        return weight.data_ptr(), weight._version
    except RuntimeError:  # no memory of its own, or, made in inference mode, no version counter
        return id(weight), weight.dtype, weight.device


def common_length(one: Any, other: Any) -> int:
    """The length of the common prefix of two arrays of ids."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
