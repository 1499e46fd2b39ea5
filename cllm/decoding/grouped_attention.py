"""Grouped-query attention (GQA) without repeating keys and values for each query head.

With a mask and more than one query token, transformers' SDPA attention repeats the visible cache for every query head, in every
layer. For a few tokens that costs more than the attention itself.
Shapes: B rows, H query heads, G query heads per key-value head, T query tokens, L key slots, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cllm.attention import GROUPED, SDPA
from cllm.decoding.scoped_patch import ScopedPatch

MOST_QUERIES = 64  # with more query tokens, repeating the cache is a small part of the work
IGNORED = {"position_ids", "sliding_window", "use_cache", "output_router_logits"}  # arguments that SDPA ignores


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """A replacement of ``sdpa_attention_forward`` that treats the heads of a group as more queries to their key-value head.

    ``query`` [B, H, T, D], ``key`` and ``value`` [B, H / G, L, D], ``attention_mask`` [B, 1, T, L]; returns [B, T, H, D]. It
    calls the original without a mask or groups, for many tokens, with gradients or dropout, and for unknown arguments.
    """
    (B, H, T, D), shared = query.shape, key.shape[1]
    applies = shared < H and T <= MOST_QUERIES and not dropout and not torch.is_grad_enabled()
    if not applies or attention_mask is None or attention_mask.shape[1] != 1 or not IGNORED.issuperset(other):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **other)
    mask = attention_mask if T == 1 else attention_mask.repeat(1, 1, H // shared, 1)
    queries = query.reshape(B, shared, H // shared * T, D)
    result = scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scaling)
    return result.reshape(B, H, T, -1).transpose(1, 2).contiguous(), None


class AttentionPatch(ScopedPatch):
    """While any thread is inside, a model with SDPA attention uses :func:`grouped_attention`.

    Other threads may run the model at the same time; their results are the same. Models that do not choose their attention
    through ``AttentionInterface`` keep their own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._config = model.config.get_text_config(decoder=True)
        self._uses_interface = getattr(model, "_supports_attention_backend", False)
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)

    def _apply(self) -> None:
        if self._uses_interface and self._config._attn_implementation == SDPA:
            self._config._attn_implementation = GROUPED

    def _remove(self) -> None:
        if self._config._attn_implementation == GROUPED:
            self._config._attn_implementation = SDPA
