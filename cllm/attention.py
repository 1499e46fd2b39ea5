"""Attention masks in the form that Hugging Face models take, and which models can take them.

Shapes: B rows, T query tokens, L key slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from cllm.errors import UnsupportedModelError

FULL = "full_attention"
SLIDING = "sliding_attention"
FLEX = "flex_attention"
SDPA = "sdpa"
GROUPED = "cllm_grouped"  # what replaces SDPA during decoding, see cllm.decoding.grouped_attention
MASKABLE = (SDPA, "eager")  # these take a 4-D mask; flash attention does not
CACHE, OLD_CACHE = "cache", "past_key_values"  # a forward's argument for the cache: since transformers 5.24, and before it
REQUIRED = ("attention_mask", "position_ids")  # further arguments that a model's forward must take
LENGTHS = 32  # attention sees a multiple of this many tokens: shapes repeat, and each new one costs time and memory
TRAINABLE = (*MASKABLE, FLEX)  # FlexAttention's block masks serve packed training, not decoding

ModelMask = torch.Tensor | BlockMask | dict[str, torch.Tensor] | dict[str, BlockMask]
Sees = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # row, query, key -> boolean


def attention_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """The attention windows of a model's layer types (``full_attention``, ``sliding_attention``), in tokens; None: no limit.

    Raises UnsupportedModelError for any other layer type.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [SLIDING if window else FULL]
    if other := sorted(set(kinds) - {FULL, SLIDING}):
        raise UnsupportedModelError(f"{text.model_type} has layers of type {', '.join(other)}; Jacobi decoding needs {FULL} or {SLIDING}")
    return {kind: window if kind == SLIDING else None for kind in sorted(set(kinds))}


def check_model(model: PreTrainedModel, attention: Sequence[str] = MASKABLE) -> None:
    """Raise UnsupportedModelError for a model whose cache cannot be rolled back or that takes no explicit masks and positions.

    ``attention``: the allowed attention implementations. :func:`cllm.decoding.self_test.self_test` catches what is unknown here.
    """
    config = model.config
    name = getattr(config, "model_type", type(model).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; Jacobi decoding needs a decoder-only causal model")
    text = config.get_text_config(decoder=True)
    croppable = getattr(DynamicCache(config=text), "is_croppable", True)  # older releases do not say
    if getattr(model, "_is_stateful", False) or not croppable:
        raise UnsupportedModelError(f"the cache of {name} cannot be rolled back (recurrent state), which Jacobi decoding needs")
    attention_windows(config)
    arguments = _arguments(model)
    missing = [argument for argument in REQUIRED if argument not in arguments]
    if CACHE not in arguments and OLD_CACHE not in arguments:
        missing.append(CACHE)
    if missing:
        raise UnsupportedModelError(f"{name} takes no {' and no '.join(missing)}, which Jacobi decoding has to pass to the model")
    if getattr(text, "alibi", False):
        raise UnsupportedModelError(f"{name} with alibi derives distances from a 2-D mask; Jacobi decoding needs 4-D masks")
    if getattr(text, "attention_type", None) == "block_sparse":
        raise UnsupportedModelError(f"{name} has block-sparse attention, which takes no 4-D masks; Jacobi decoding needs them")
    if tables := [table for table, buffer in model.named_buffers() if _is_mask(buffer)]:
        raise UnsupportedModelError(
            f"{name} masks by the length of its cache ({tables[0]}), while Jacobi decoding needs masks by explicit positions"
        )
    if config._attn_implementation not in (*attention, GROUPED):  # GROUPED while another thread is decoding
        raise UnsupportedModelError(
            f"attn_implementation is {config._attn_implementation!r}; explicit masks need one of {', '.join(attention)}"
        )


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the argument by which ``model(...)`` takes its cache."""
    return CACHE if CACHE in _arguments(model) else OLD_CACHE


def _arguments(model: PreTrainedModel) -> Collection[str]:
    """The arguments of the model's own forward, without peft's wrapper."""
    unwrap: Any = getattr(model, "get_base_model", None)
    base = unwrap() if unwrap else model
    return inspect.signature(base.forward).parameters


def _is_mask(buffer: torch.Tensor) -> bool:
    """Whether a buffer looks like a fixed causal mask."""
    return buffer.dim() == 4 and buffer.shape[:2] == (1, 1) and buffer.shape[2] == buffer.shape[3] > 1


def model_mask(
    config: PretrainedConfig,
    visible_BTL: torch.Tensor,
    query_positions_BT: torch.Tensor,
    key_positions_BL: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The ``attention_mask`` argument of ``model(...)`` for the boolean ``visible_BTL``.

    Layers with a sliding window also mask keys ``window`` or more positions back. The mask is additive, in ``dtype``, because
    SDPA would convert a boolean one in every layer. A model that mixes layer types gets a dict by type.
    """

    def mask(window: int | None) -> torch.Tensor:
        visible = visible_BTL
        if window is not None:
            visible = visible & (query_positions_BT[:, :, None] - key_positions_BL[:, None, :] < window)
        hidden = ~visible[:, None]
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)

    return _by_kind(config, mask)


def flex_mask(
    config: PretrainedConfig, sees: Sees, query_positions_BT: torch.Tensor, key_positions_BL: torch.Tensor
) -> BlockMask | dict[str, BlockMask]:
    """:func:`model_mask` for FlexAttention, from a predicate on row, query and key.

    On a GPU, nothing of size [T, L] is allocated.
    """
    (B, T), L, device = query_positions_BT.shape, key_positions_BL.shape[1], query_positions_BT.device

    def mask(window: int | None) -> BlockMask:
        def visible(row, head, query, key):
            if window is None:
                return sees(row, query, key)
            return sees(row, query, key) & (query_positions_BT[row, query] - key_positions_BL[row, key] < window)

        return create_block_mask(visible, B, None, T, L, device=device, _compile=device.type == "cuda")

    return _by_kind(config, mask)


def _by_kind(config: PretrainedConfig, mask: Callable[[int | None], Any]) -> Any:
    """The mask of the model's only layer type, or a dict of masks by layer type."""
    masks = {kind: mask(window) for kind, window in attention_windows(config).items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def round_up(tokens: int, unit: int = LENGTHS) -> int:
    """``tokens``, rounded up to a multiple of ``unit``."""
    return -(-tokens // unit) * unit
