"""Rotary embeddings whose frequencies depend on how long the text is (longrope), for each token as AR decoding has them.

transformers' longrope has two sets of frequencies and takes one for a whole forward, by its longest position. A window's
guesses, a longer neighbour or the first part of a long prompt would then change the numbers of tokens that AR decoding
computes with the other set.
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

from cllm.decoding.lending import Lending, LentForward
from cllm.models import LONGROPE, rotary_switch


class Rotary(Lending):
    """A model's rotary embeddings with longrope; while :meth:`reaching` is entered, each token has its own frequencies."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._reach: dict[int, torch.Tensor] = {}  # of threads
        switch = rotary_switch(model.config)
        layers = [layer for layer in model.modules() if _is_longrope(layer)] if switch else []
        self._embeddings = [_Embedding(layer, int(switch or 0), self._reach) for layer in layers]

    def __bool__(self) -> bool:
        """Whether the model has any."""
        return bool(self._embeddings)

    @contextmanager
    def reaching(self, reach_BT: torch.Tensor) -> Iterator[None]:
        """Entered, for a forward whose tokens AR decoding computes in forwards with these longest positions."""
        if not self:
            yield
            return
        self._reach[get_ident()] = reach_BT
        try:
            with self:
                yield
        finally:
            del self._reach[get_ident()]

    def _put_in(self) -> None:
        for embedding in self._embeddings:
            embedding.put_in()

    def _take_out(self) -> None:
        for embedding in self._embeddings:
            embedding.take_out()


class _Embedding(LentForward):
    """The ``forward`` of a rotary embedding: cosine and sine [B, T, D] of each token from the set that its reach asks for."""

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
        return tuple(torch.where(is_long, of_long[..., :-1, :], of_short) for of_long, of_short in zip(long, short))


def _is_longrope(layer: nn.Module) -> bool:
    kinds = getattr(layer, "rope_type", None)
    return LONGROPE in (kinds.values() if isinstance(kinds, dict) else [kinds])
