"""Linear layers of a model while it decodes or makes trajectories: by oneDNN on an x86 CPU, with an adapter on draft tokens.

torch gives float32 matrices to MKL there, which takes longer for a few rows than the weights need to be read: on an AMD CPU
for a single row already. oneDNN, which torch carries along for reduced precision and for compiled models, does not, least of
all on weights that were laid out for it before. On an Intel CPU MKL is the faster one up to three rows.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from cllm.adapter import Adapter
from cllm.decoding.deltas import Deltas, Drafting
from cllm.decoding.lending import Forward, Lending, LentForward, own_forward

Fingerprint = tuple[object, ...]
PACKED_BYTES = 2 << 30  # of weights that are kept a second time, laid out for oneDNN
PACKED_ROWS = 16  # the number of input rows that they are laid out for


class Linears(Lending):
    """A model's linear layers; while this is entered, what the thread computes with them without gradients goes to oneDNN.

    Entered by :meth:`drafting`, layers also add what a consistency adapter has for them to the draft tokens. Other threads,
    and decoders with other adapters, see nothing of it.

    Outside, and in all that can be seen of it, the model is as it was. Weights are those of the last :meth:`refresh`. Left
    to torch are models that are not in float32 on an x86 CPU, up to three rows of input on an Intel CPU, layers of another type
    than ``nn.Linear`` or with a ``forward`` of their own, and everything under autocast, torch.compile or
    ``torch.backends.mkldnn.flags(enabled=False)``. Memory: a second copy of these layers' weights where they have PACKED_BYTES
    at most, until the model goes or :meth:`clear`; larger models are computed on the weights as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._products: list[_Product] = []
        self._seen: list[Fingerprint] = []  # of the weights that were packed
        self.changes = 0  # how often a refresh found other layers or weights
        self._deltas: WeakKeyDictionary[Adapter, Deltas] = WeakKeyDictionary()
        self._active = _Active(self._inside)
        self._tracing = Lock()

    @classmethod
    def fresh(cls, model: PreTrainedModel) -> Linears:
        """That one, for the weights as they are now."""
        linears = cls.of(model)
        linears.refresh()
        return linears

    @torch.inference_mode()
    def refresh(self, adapter: Adapter | None = None) -> None:
        """Look at the weights anew, at the cost of about one token: they may have been trained, replaced or moved.

        ``adapter``: one that :meth:`drafting` will be asked for.
        """
        if (model := self._model()) is None:
            return
        with self._lock:
            self._leave()  # an interrupt may have kept this thread from it
            if adapter is not None and not (adapter in self._deltas and self._deltas[adapter].fit(model)):
                self._deltas[adapter] = Deltas(model, adapter)
            self._find_products(model)

    def _find_products(self, model: PreTrainedModel) -> None:
        adapted = {name for deltas in self._deltas.values() for name in deltas.pairs}
        fast = bool(torch.backends.mkldnn.enabled)
        named = [(name, layer, fast and _suits(layer), own_forward(layer)) for name, layer in model.named_modules()]
        layers: list[tuple[str, Any, bool, Forward | None]] = [item for item in named if item[2] or item[0] in adapted]
        weights = [layer.weight for _, layer, suits, _ in layers if suits]
        packs = sum(weight.nbytes for weight in weights) <= PACKED_BYTES
        seen = [_fingerprint(weight) for weight in weights] if packs else []
        known = [(product.name, product.layer, product.fast, product.own) for product in self._products]
        if known == layers and seen == self._seen:
            return
        self.changes += 1
        self._drop()  # the old copies go before new ones are made
        self._products = [_Product(name, layer, fast, packs, self._active) for name, layer, fast, _ in layers]
        self._seen = seen
        if self._inside:  # other threads
            self._put_in()

    @contextmanager
    def drafting(self, adapter: Adapter | None, length: int, tokens: int) -> Iterator[None]:
        """Entered, with ``adapter`` on the last ``tokens`` of the ``length`` tokens that each row has in a forward."""
        if adapter is None or not tokens:
            with self:
                yield
            return
        drafting = self._active.drafting[get_ident()] = Drafting(self._deltas[adapter], length, tokens)
        try:
            with self:
                yield
            drafting.finish()
        finally:
            del self._active.drafting[get_ident()]

    @contextmanager
    def traced(self, adapter: Adapter, length: int, tokens: int) -> Iterator[None]:
        """The same around a function under torch.compile, which cannot tell threads apart: one at a time may be in here."""
        with self._tracing, self.drafting(adapter, length, tokens):
            self._active.traced = self._active.drafting.get(get_ident())
            try:
                yield
            finally:
                self._active.traced = None

    def clear(self) -> None:
        """Give the memory back, until the next :meth:`refresh`."""
        with self._lock:
            self._leave()
            self._drop()
            self._deltas.clear()

    def _put_in(self) -> None:
        self._active.fast = bool(torch.backends.mkldnn.enabled)
        for product in self._products:
            product.put_in()

    def _take_out(self) -> None:
        for product in self._products:
            product.take_out()

    def _drop(self) -> None:
        self._take_out()
        self._products, self._seen = [], []


class _Active:
    """Who is inside, and who drafts."""

    def __init__(self, inside: set[int]) -> None:
        self.inside = inside  # threads
        self.drafting: dict[int, Drafting] = {}  # of threads
        self.traced: Drafting | None = None  # of a function under torch.compile
        self.fast = True  # is oneDNN switched on


class _Product(LentForward):
    """The ``forward`` of a linear layer: on its weights as they are or packed, then with an adapter's delta."""

    def __init__(self, name: str, layer: Any, fast: bool, packs: bool, active: _Active) -> None:
        super().__init__(layer)
        self.name, self.fast, self.active = name, fast, active
        self.packed = _packed(layer.weight) if fast and packs else None
        self.fewest = _fewest_rows() * layer.weight.shape[1] if fast else 0  # numbers of an input that oneDNN is faster for

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            inside, drafting = False, self.active.traced
        else:
            inside, drafting = get_ident() in self.active.inside, self.active.drafting.get(get_ident())
        taken = self.fast and inside and self.active.fast and input.numel() >= self.fewest
        if taken and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
            weight = self.layer.weight if self.packed is None else self.packed
            output = _multiply(input, weight, self.layer.bias)
        else:
            output = self.plain(input)
        if drafting is not None:
            drafting.add(self.name, input, output)
        return output


def _suits(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or own_forward(layer) is not None:
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
        _multiply(weight, _packed(weight))
    except (AttributeError, RuntimeError):
        return False
    return True


@lru_cache
def _fewest_rows() -> int:
    """From how many rows of input on oneDNN is faster than MKL."""
    cpuinfo = Path("/proc/cpuinfo")
    name = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    return 4 if "GenuineIntel" in name else 1


def _fingerprint(weight: torch.Tensor) -> Fingerprint:
    """Of every bit: edits through ``.data`` or numpy leave version counters and data pointers as they were.

    An exported model may run where nothing installs xxhash; such edits are not seen there.
    """
    try:
        from xxhash import xxh3_128_digest
    except ImportError:
        return weight.shape, weight.data_ptr(), weight._version
    return weight.shape, xxh3_128_digest(weight.detach().numpy().data)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [..., in] times the transpose of ``weight`` [out, in], packed or not, plus ``bias`` [out]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
