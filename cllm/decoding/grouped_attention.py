"""Attention of query heads that share a key-value head (GQA), without a copy of keys and values for each of them.

Under a mask transformers' SDPA attention copies what a forward sees of the cache once per query head, in every layer, for
windows of more than one token. For a few tokens that costs more than the attention itself.
Shapes: B rows, H query heads, G of them to a key-value head, T query tokens, L key slots, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cllm.attention import GROUPED, SDPA
from cllm.decoding.lending import Lending

MOST_QUERIES = 64  # beyond as many tokens the copy is a small part of the work
IGNORED = {"position_ids", "sliding_window", "use_cache", "output_router_logits"}  # arguments that SDPA makes nothing of


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
    """What ``sdpa_attention_forward`` returns, [B, T, H, D]: the heads of a group are further queries of their key-value head.

    ``query`` [B, H, T, D], ``key`` and ``value`` [B, H / G, L, D], ``attention_mask`` [B, 1, T, L]. It is left to
    transformers where there is no mask or no group, for many tokens, for training and for arguments not known here.
    """
    (B, H, T, D), shared = query.shape, key.shape[1]
    worth = shared < H and T <= MOST_QUERIES and not dropout and not torch.is_grad_enabled()
    if not worth or attention_mask is None or attention_mask.shape[1] != 1 or not IGNORED.issuperset(other):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **other)
    mask = attention_mask if T == 1 else attention_mask.repeat(1, 1, H // shared, 1)
    queries = query.reshape(B, shared, H // shared * T, D)
    result = scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scaling)
    return result.reshape(B, H, T, -1).transpose(1, 2).contiguous(), None


class GroupedAttention(Lending):
    """While some thread has entered this, the attention of its model is :func:`grouped_attention` where it was SDPA.

    Other threads may use the model meanwhile; they get the same results. Models that do not look their attention up
    keep their own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._config = model.config.get_text_config(decoder=True)
        self._looked_up = getattr(model, "_supports_attention_backend", False)
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)

    def _put_in(self) -> None:
        if self._looked_up and self._config._attn_implementation == SDPA:
            self._config._attn_implementation = GROUPED

    def _take_out(self) -> None:
        if self._config._attn_implementation == GROUPED:
            self._config._attn_implementation = SDPA
