"""Rotary embeddings whose frequencies depend on the length of the text (longrope), chosen per token as AR decoding has them.

transformers' longrope has two sets of frequencies and chooses one per forward, by its largest position. Guesses in a window, a
longer row of the batch or a chunk of a long prompt would switch tokens that AR decoding computes with the other set.
Paper: LongRoPE, arXiv 2402.13753, section 3.3.
Shapes: B rows, T tokens of a forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cllm.decoding.scoped_patch import PatchedForward, ScopedPatch
from cllm.models import LONGROPE, rotary_switch


class RotaryPatch(ScopedPatch):
    """Inside :meth:`reaching`, the model's longrope embeddings choose their frequencies for each token separately."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._reach: dict[int, torch.Tensor] = {}  # by thread id
        switch = rotary_switch(model.config)
        layers = [layer for layer in model.modules() if _is_longrope(layer)] if switch else []
        self._embeddings = [_Embedding(layer, int(switch or 0), self._reach) for layer in layers]

    def __bool__(self) -> bool:
        """Whether the model uses longrope."""
        return bool(self._embeddings)

    @contextmanager
    def reaching(self, reach_BT: torch.Tensor) -> Iterator[None]:
        """Enter for one forward. ``reach_BT``: the largest position in the forward in which AR decoding computes each token."""
        if not self:
            yield
            return
        self._reach[get_ident()] = reach_BT
        try:
            with self:
                yield
        finally:
            del self._reach[get_ident()]

    def _apply(self) -> None:
        for embedding in self._embeddings:
            embedding.apply()

    def _remove(self) -> None:
        for embedding in self._embeddings:
            embedding.remove()


class _Embedding(PatchedForward):
    """The ``forward`` of a rotary embedding: cosine and sine [B, T, D], each token's from the set for its reach."""

    def __init__(self, layer: nn.Module, switch: int, reach: dict[int, torch.Tensor]) -> None:
        super().__init__(layer)
        self.switch, self.reach = switch, reach

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        reach_BT = self.reach.get(get_ident())
        if reach_BT is None:  # another thread's forward
            return self.plain(x, position_ids, *args, **kwargs)
        beyond = torch.full_like(position_ids[..., :1], self.switch)
        short = self.plain(x, position_ids.clamp(max=self.switch - 1), *args, **kwargs)
        long = self.plain(x, torch.cat([position_ids, beyond], dim=-1), *args, **kwargs)
        is_long = (reach_BT >= self.switch)[..., None].to(position_ids.device)
        return tuple(torch.where(is_long, far[..., :-1, :], near) for far, near in zip(long, short))


def _is_longrope(layer: nn.Module) -> bool:
    kinds = getattr(layer, "rope_type", None)
    return LONGROPE in (kinds.values() if isinstance(kinds, dict) else [kinds])
