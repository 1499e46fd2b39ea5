"""Linear layers of a model on an x86 CPU, computed by oneDNN while it decodes or makes trajectories.

torch gives float32 matrices to MKL there, which can take twice as long for a few rows as for one, and for both longer than
the weights need to be read. oneDNN, which torch carries along for reduced precision and for compiled models, does not,
least of all on weights that were laid out for it before.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cllm.decoding.lending import Lending

PACKED_BYTES = 2 << 30  # of weights that are kept a second time, laid out for oneDNN
PACKED_ROWS = 16  # the number of input rows that they are laid out for


class Linears(Lending):
    """A model's linear layers; while this is entered, what the thread computes with them without gradients goes to oneDNN.

    Outside, and in all that can be seen of it, the model is as it was. Weights are those of the last :meth:`refresh`. Left
    alone are models that are not in float32 on an x86 CPU, layers of another type than ``nn.Linear`` or with a ``forward`` of
    their own, and everything under ``torch.backends.mkldnn.flags(enabled=False)``, autocast or torch.compile. Memory: a second
    copy of these layers' weights where they have PACKED_BYTES at most, until the model goes or :meth:`clear`; larger models
    are computed on the weights as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._products: list[_Product] = []
        self._seen: list[torch.Tensor] = []  # what tells the weights that were packed from others

    @classmethod
    def fresh(cls, model: PreTrainedModel) -> Linears:
        """That one, for the weights as they are now."""
        linears = cls.of(model)
        linears.refresh()
        return linears

    @torch.inference_mode()
    def refresh(self) -> None:
        """Look at the weights anew, at the cost of about one token: they may have been trained, replaced or moved."""
        if not torch.backends.mkldnn.enabled or (model := self._model()) is None:
            return self.clear()
        with self._lock:
            self._leave()  # an interrupt may have kept this thread from it
            layers: list[Any] = [layer for layer in model.modules() if _suits(layer)]
            seen = [_multiply(_probe(layer.weight), layer.weight) for layer in layers]
            if [product.layer for product in self._products] == layers and all(map(torch.equal, seen, self._seen)):
                return
            self._drop()  # the old copies go before new ones are made
            packed = sum(layer.weight.nbytes for layer in layers) <= PACKED_BYTES
            self._products = [_Product(layer, _packed(layer.weight) if packed else None, self._inside) for layer in layers]
            self._seen = seen
            if self._inside:  # other threads
                self._put_in()

    def clear(self) -> None:
        """Give the memory back, until the next :meth:`refresh`."""
        with self._lock:
            self._leave()
            self._drop()

    def _put_in(self) -> None:
        for product in self._products if torch.backends.mkldnn.enabled else ():
            product.attributes.setdefault("forward", product)

    def _take_out(self) -> None:
        for product in self._products:
            if product.attributes.get("forward") is product:
                del product.attributes["forward"]

    def _drop(self) -> None:
        self._take_out()
        self._products, self._seen = [], []


class _Product:
    """The ``forward`` of a linear layer, on its weights as they are or packed."""

    def __init__(self, layer: nn.Linear, packed: torch.Tensor | None, inside: set[int]) -> None:
        self.layer, self.attributes, self.packed, self.inside = layer, layer.__dict__, packed, inside

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if plain or get_ident() not in self.inside:  # another thread does something else with the model
            return nn.functional.linear(input, layer.weight, layer.bias)
        return _multiply(input, layer.weight if self.packed is None else self.packed, layer.bias)


def _suits(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or not isinstance(layer.__dict__.get("forward"), (_Product, type(None))):
        return False
    weight = layer.weight
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and weight.numel() > 0 and weight.dtype == torch.float32 and _supported()


@lru_cache
def _supported() -> bool:
    """Whether this torch on this CPU has what is needed; on ARM torch goes its own good way."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    weight = torch.zeros(8, 8)
    try:
        _multiply(_probe(weight), _packed(weight))
    except (AttributeError, RuntimeError):
        return False
    return True


def _probe(weight: torch.Tensor) -> torch.Tensor:
    """[1, in]: no two of its numbers are alike, so that a product with it tells weights from others, in any order."""
    return torch.linspace(1, 2, weight.shape[1])[None]


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [..., in] times the transpose of ``weight`` [out, in], packed or not, plus ``bias`` [out]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
