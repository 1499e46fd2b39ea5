"""Linear layers of a model on an x86 CPU, computed by oneDNN while it decodes or makes trajectories.

torch gives float32 matrices to MKL there, which takes twice as long for a few rows as for one, and for both longer than
the weights need to be read. oneDNN, which torch carries along for reduced precision and for compiled models, does not,
least of all on weights that were laid out for it before.
"""

from __future__ import annotations

import platform
from functools import lru_cache, partial
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

PACKED_BYTES = 4 << 30  # of weights that are kept a second time, laid out for oneDNN
PACKED_ROWS = 16  # the number of input rows that they are laid out for
DTYPES = (torch.float32, torch.bfloat16)


class Linears:
    """A model's linear layers; while this is entered, a forward pass without gradients computes them by oneDNN.

    Outside, and in all that can be seen of it, the model is as it was. Left alone are models that are not on an x86 CPU,
    layers of another type than ``nn.Linear`` or with a ``forward`` of their own, other dtypes than float32 and bfloat16, and
    everything under ``torch.backends.mkldnn.flags(enabled=False)`` or autocast. Memory: a second copy of these layers'
    weights where they have PACKED_BYTES at most, as long as a decoder of the model lives; larger models are computed on
    the weights as they are.
    """

    _known: WeakValueDictionary[int, Linears] = WeakValueDictionary()  # by the ids of their models, which they keep alive

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._lock, self._inside = Lock(), 0
        self._layers: list[nn.Linear] = []
        self._seen: list[torch.Tensor] = []  # what tells the weights that were packed from others
        self._places: list[tuple[dict[str, Any], Any]] = []  # the attributes of each layer, and the forward that goes there

    @classmethod
    def of(cls, model: PreTrainedModel) -> Linears:
        """The one that all decoders of a model share."""
        return cls._known.setdefault(id(model), cls(model))

    @classmethod
    def fresh(cls, model: PreTrainedModel) -> Linears:
        """That one, for the weights as they are now."""
        linears = cls.of(model)
        linears.refresh()
        return linears

    @torch.inference_mode()
    def refresh(self) -> None:
        """Look at the weights anew, at the cost of about one token: they may have been trained, replaced or moved."""
        with self._lock:
            if self._inside:  # another thread is decoding with them
                return
            layers: list[Any] = [layer for layer in self.model.modules() if _suits(layer)]
            seen = [_multiply(_probe(layer.weight), layer.weight) for layer in layers]
            packed = sum(layer.weight.nbytes for layer in layers) <= PACKED_BYTES
            if self._layers == layers and all(map(torch.equal, seen, self._seen)):
                return
            self._places = []  # frees the old copies before new ones are made
            self._layers, self._seen = layers, seen
            for layer in layers:
                forward = partial(_forward, layer, _packed(layer.weight) if packed else None)
                self._places.append((layer.__dict__, forward))

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu"):
                for own, forward in self._places:
                    own["forward"] = forward
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for own, _ in self._places:
                    own.pop("forward", None)


def _suits(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and weight.numel() > 0 and weight.dtype in DTYPES and _supported(weight.dtype)


@lru_cache
def _supported(dtype: torch.dtype) -> bool:
    """Whether this torch on this CPU has what is needed; on ARM torch goes its own good way."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    weight = torch.zeros(8, 8, dtype=dtype)
    try:
        _multiply(_probe(weight), _packed(weight))
    except (AttributeError, RuntimeError):
        return False
    return True


def _probe(weight: torch.Tensor) -> torch.Tensor:
    """[1, in]: no two of its numbers are alike, so a product with it shows any change of the weights."""
    return torch.linspace(1, 2, weight.shape[1], dtype=weight.dtype)[None]


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [..., in] times the transpose of ``weight`` [out, in], packed or not, plus ``bias`` [out]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _forward(layer: nn.Linear, packed: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():  # another thread trains the model
        return nn.functional.linear(x, layer.weight, layer.bias)
    return _multiply(x, layer.weight if packed is None else packed, layer.bias)
