"""oneDNN's matrix product, as torch has it for compiled models, with weights in oneDNN's own layout."""

from __future__ import annotations

import platform
from functools import lru_cache

import torch

from cllm.processor import has_amx

PACKED_ROWS = 16  # the number of input rows that packing optimises for


@lru_cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether the product of this type exists and pays on this CPU; on ARM, torch's own backend is kept."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and has_amx()):
        return False
    weight = torch.zeros(8, 8, dtype=dtype)
    try:
        multiply(weight, pack_weight(weight))
    except (AttributeError, RuntimeError):
        return False
    return True


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``weight`` [out, in] for :func:`multiply`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [..., in] times the transpose of ``weight`` [out, in], packed or not, plus ``bias`` [out]."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
