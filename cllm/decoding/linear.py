"""Linear layers during decoding and collection: computed by oneDNN on x86 CPUs, with an adapter on draft tokens.

For float32 on x86, torch uses MKL, which is slower than memory bandwidth allows for a few rows of input (on AMD CPUs even for
one). oneDNN, which ships with torch for reduced precision and compiled models, is not, above all with weights packed in its
own layout. On Intel CPUs, MKL is faster for up to three rows. For bfloat16 torch uses oneDNN, but rearranges the weights in every
forward; packed once, they give the same bits sooner.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from cllm.adapter import Adapter
from cllm.decoding.deltas import Deltas, DraftPass
from cllm.decoding.onednn import PACKED_ROWS, has_onednn, multiply, pack_weight
from cllm.decoding.scoped_patch import Forward, PatchedForward, ScopedPatch, overridden_forward
from cllm.processor import is_intel

Fingerprint = tuple[object, ...]
TWO_TILES = 64  # inputs of a layer that fill two matrix units
PACKED_BYTES = 2 << 30  # weights of up to this size in total are also kept packed for oneDNN


class LinearPatch(ScopedPatch):
    """While a thread is inside, oneDNN computes what that thread runs through the model's linear layers without gradients.

    Inside :meth:`drafting`, the layers also add a consistency adapter's deltas to the draft tokens. Neither affects other
    threads or decoders with other adapters, and after leaving, the model is unchanged.

    Weights are those of the last :meth:`refresh`. torch keeps computing everything that is neither float32 on an x86 CPU nor
    bfloat16 on one with matrix units for it (AMX), up to three rows of float32 input on an Intel CPU, layers that are not exactly
    ``nn.Linear`` or have a ``forward`` of their own, and everything under autocast, torch.compile or
    ``torch.backends.mkldnn.flags(enabled=False)``. Memory: a packed copy of the layers' weights if they total at most
    PACKED_BYTES, until :meth:`clear` or the end of the model; larger models use their weights unpacked.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._products: list[_Product] = []
        self._seen: list[Fingerprint] = []  # of the packed weights
        self.changes = 0  # number of refreshes that found other layers or weights
        self._deltas: WeakKeyDictionary[Adapter, Deltas] = WeakKeyDictionary()
        self._active = _Active(self._inside)
        self._tracing = Lock()

    @classmethod
    def refreshed(cls, model: PreTrainedModel) -> LinearPatch:
        """The model's patch, after a :meth:`refresh`."""
        patch = cls.for_model(model)
        patch.refresh()
        return patch

    @torch.inference_mode()
    def refresh(self, adapter: Adapter | None = None) -> None:
        """Account for weights that were trained, replaced or moved; costs about as much as decoding one token.

        ``adapter``: prepare it for :meth:`drafting`.
        """
        if (model := self._model()) is None:
            return
        with self._lock:
            self._leave()  # in case an interrupt kept this thread from leaving
            if adapter is not None and not (adapter in self._deltas and self._deltas[adapter].is_current(model)):
                self._deltas[adapter] = Deltas(model, adapter)
            self._find_products(model)
            if adapter is not None and self._deltas[adapter].joined is None:
                self._deltas[adapter].joined = self._join(self._deltas[adapter])

    def _join(self, deltas: Deltas) -> dict[str, torch.Tensor]:
        """The adapted layers' weights beside the adapter's second matrices, packed; none where that changes a bit of the text."""
        found = {}
        for product in self._products:
            if (up_RO := deltas.ups.get(product.name)) is not None:
                joined = None if product.packed is None else _joined(product.layer.weight, product.packed, up_RO)
                if joined is None:
                    return {}
                found[product.name] = joined
        return found

    def _find_products(self, model: PreTrainedModel) -> None:
        adapted = {name for deltas in self._deltas.values() for name in deltas.ups}
        fast = bool(torch.backends.mkldnn.enabled)
        named = [(name, layer, fast and _suits(layer), overridden_forward(layer)) for name, layer in model.named_modules()]
        layers: list[tuple[str, Any, bool, Forward | None]] = [item for item in named if item[2] or item[0] in adapted]
        weights = [layer.weight for _, layer, suits, _ in layers if suits]
        packs = sum(weight.nbytes for weight in weights) <= PACKED_BYTES
        seen = [_fingerprint(weight) for weight in weights] if packs else []
        known = [(product.name, product.layer, product.fast, product.override) for product in self._products]
        if known == layers and seen == self._seen:
            return
        self.changes += 1
        self._drop()  # free the old copies first
        self._products = [_Product(name, layer, fast, packs, self._active) for name, layer, fast, _ in layers]
        self._seen = seen
        if self._inside:  # other threads
            self._apply()

    @contextmanager
    def drafting(self, adapter: Adapter | None, length: int, tokens: int) -> Iterator[None]:
        """Enter for one forward, with ``adapter`` on the last ``tokens`` of the ``length`` tokens of each row."""
        if adapter is None or not tokens:
            with self:
                yield
            return
        drafting = self._active.drafting[get_ident()] = DraftPass(self._deltas[adapter], length, tokens)
        try:
            with self:
                yield
            drafting.finish()
        finally:
            del self._active.drafting[get_ident()]

    @contextmanager
    def traced(self, adapter: Adapter, length: int, tokens: int) -> Iterator[None]:
        """:meth:`drafting` around a compiled function, which cannot tell threads apart, so that they wait for each other."""
        with self._tracing, self.drafting(adapter, length, tokens):
            self._active.traced = self._active.drafting.get(get_ident())
            try:
                yield
            finally:
                self._active.traced = None

    def clear(self) -> None:
        """Free the memory until the next :meth:`refresh`."""
        with self._lock:
            self._leave()
            self._drop()
            self._deltas.clear()

    def _apply(self) -> None:
        self._active.fast = bool(torch.backends.mkldnn.enabled)
        for product in self._products:
            product.apply()

    def _remove(self) -> None:
        for product in self._products:
            product.remove()

    def _drop(self) -> None:
        self._remove()
        self._products, self._seen = [], []
        for deltas in self._deltas.values():
            deltas.joined = None


class _Active:
    """Which threads are inside, and their forwards with draft tokens."""

    def __init__(self, inside: set[int]) -> None:
        self.inside = inside  # ids of threads
        self.drafting: dict[int, DraftPass] = {}  # by thread id
        self.traced: DraftPass | None = None  # of the compiled function
        self.fast = True  # whether oneDNN is enabled


class _Product(PatchedForward):
    """The ``forward`` of a linear layer, on its weights or their packed copy, plus an adapter's delta."""

    def __init__(self, name: str, layer: Any, fast: bool, packs: bool, active: _Active) -> None:
        super().__init__(layer)
        self.name, self.fast, self.active = name, fast, active
        self.packed = pack_weight(layer.weight) if fast and packs else None
        self.fewest = _fewest_rows(layer.weight.dtype) * layer.weight.shape[1] if fast else 0  # input size from which it is faster

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            inside, drafting = False, self.active.traced
        else:
            inside, drafting = get_ident() in self.active.inside, self.active.drafting.get(get_ident())
        fast = self.fast and inside and self.active.fast and input.numel() >= self.fewest
        if fast and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
            if drafting is not None and (both := drafting.multiply(self.name, input, self.layer.bias)) is not None:
                return both
            weight = self.layer.weight if self.packed is None else self.packed
            output = multiply(input, weight, self.layer.bias)
        else:
            output = self.plain(input)
        if drafting is not None:
            drafting.add(self.name, input, output)
        return output


def _suits(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or overridden_forward(layer) is not None:
        return False
    weight = layer.weight
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and weight.numel() > 0 and has_onednn(weight.dtype)


def _fewest_rows(dtype: torch.dtype) -> int:
    """The number of input rows from which oneDNN is faster than what torch uses."""
    return 4 if dtype == torch.float32 and is_intel() else 1


def _fingerprint(weight: torch.Tensor) -> Fingerprint:
    """A hash of the whole weight, because edits through ``.data`` or numpy change neither its version nor its address.

    Exported models may run without xxhash; there, such edits go unnoticed.
    """
    try:
        from xxhash import xxh3_128_digest
    except ImportError:
        return weight.shape, weight.data_ptr(), weight._version
    return weight.shape, xxh3_128_digest(weight.detach().view(torch.uint8).numpy().data)


def _joined(weight_OI: torch.Tensor, packed: torch.Tensor, up_RO: torch.Tensor) -> torch.Tensor | None:
    """``weight_OI`` and the transpose of ``up_RO`` side by side, packed.

    None if the products with zeros for the latter are not, bit by bit, those with ``packed``, which is ``weight_OI`` packed. In
    bfloat16, weights with few inputs have another kernel, whose results differ too rarely for a trial.
    """
    few = weight_OI.dtype == torch.bfloat16 and weight_OI.shape[1] < TWO_TILES
    if few or not up_RO.isfinite().all():
        return None
    joined = pack_weight(torch.cat([weight_OI.detach(), up_RO.T], dim=1))
    x_TI = torch.randn(PACKED_ROWS, weight_OI.shape[1], generator=torch.Generator().manual_seed(0)).to(weight_OI.dtype)
    for rows_TI in (x_TI, x_TI[:5]):
        if not multiply(pad(rows_TI, (0, len(up_RO))), joined).equal(multiply(rows_TI, packed)):
            return None
    return joined
