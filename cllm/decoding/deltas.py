"""The low-rank terms that a consistency adapter adds to a model's linear layers during decoding.

``x W' + (x A') B'`` is one product, ``[x, x A'] [W, B]'``, and with zeros in place of ``x A'`` it is ``x W'``, for the tokens that
are no drafts. :class:`cllm.decoding.linear.LinearPatch` computes it so where it has packed ``[W, B]``; elsewhere the term is added.

Shapes: B rows, T tokens of a forward, the last N of which are draft tokens; I inputs and O outputs of a layer, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import groupby

import torch
from transformers import PreTrainedModel

from cllm.adapter import Adapter
from cllm.decoding.onednn import multiply, pack_weight


class Deltas:
    """An adapter's matrices, each on its layer's device and in the model's dtype.

    Layers that got the same input tensor in the first forward, such as the query, key and value projections, share one
    product with their concatenated first matrices from then on.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        adapter.check(model)
        layers = dict(model.named_modules())
        self.placement = [(name, layers[name].weight.device, model.dtype) for name in adapter.down]
        self.downs = {name: Down(adapter.down[name].to(device, dtype).T.contiguous()) for name, device, dtype in self.placement}
        self.ups = {name: adapter.up[name].to(device, dtype).T.contiguous() for name, device, dtype in self.placement}  # [R, O]
        self.groups: dict[str, Group] | None = None  # by the name of their first layer; None before the first forward
        self.joined: Mapping[str, torch.Tensor] | None = None  # [W, B], packed: of all layers, or of none; None: not tried yet

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the layers still have the device and dtype of the matrices."""
        layers = dict(model.named_modules())
        return all(
            name in layers and layers[name].weight.device == device and model.dtype == dtype for name, device, dtype in self.placement
        )

    def group(self, inputs: list[tuple[str, torch.Tensor]]) -> None:
        """Group the layers by input. ``inputs``: name and input tensor of each adapted layer, in the order of the forward."""
        shared = [[name for name, _ in run] for _, run in groupby(inputs, key=lambda item: id(item[1]))]
        self.groups = {names[0]: Group(names, [self.downs[name] for name in names]) for names in shared if len(names) > 1}


class Down:
    """The first matrix of a layer, or those of several layers side by side."""

    def __init__(self, matrix_IR: torch.Tensor) -> None:
        self.matrix_IR = matrix_IR

    @cached_property
    def packed(self) -> torch.Tensor:
        """The matrix for :func:`cllm.decoding.onednn.multiply`."""
        return pack_weight(self.matrix_IR.T)


class Group:
    """The first matrices of the layers that share an input."""

    def __init__(self, names: list[str], downs: list[Down]) -> None:
        self.names, self.ranks = names, [down.matrix_IR.shape[1] for down in downs]
        self.down = Down(torch.cat([down.matrix_IR for down in downs], dim=1))


class DraftPass:
    """One forward with deltas on the last ``tokens`` of the ``length`` tokens of each row."""

    def __init__(self, deltas: Deltas, length: int, tokens: int) -> None:
        self.deltas, self.length, self.tokens = deltas, length, tokens
        self.joined = deltas.joined or {}  # the same in the whole forward, whatever other threads do
        self.inputs: list[tuple[str, torch.Tensor]] = []  # of the layers so far, recorded only in the first forward
        self.shared: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None  # the latest group's input and products

    def finish(self) -> None:
        """To be called after the forward."""
        if self.deltas.groups is None and self.inputs:
            self.deltas.group(self.inputs)

    def multiply(self, name: str, input: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor | None:
        """The layer's output and delta in one product; None if the layer has none joined, or where :meth:`add` adds nothing."""
        joined = self.joined.get(name)
        if joined is None or not self._in_order(input):
            return None

        def drafts_alone(down: Down) -> torch.Tensor:
            product = multiply(input, down.packed)
            product.view(-1, self.length, product.shape[-1])[:, : -self.tokens].zero_()
            return product

        return multiply(torch.cat([input, self._reduced(name, input, drafts_alone)], dim=-1), joined, bias_O)

    def add(self, name: str, input_BTI: torch.Tensor, output_BTO: torch.Tensor) -> None:
        """Add the layer's delta to its output, in place.

        Some models flatten rows and tokens into one dimension. An input of any other length, such as the tokens routed to
        one expert of a mixture, has lost its order, so nothing is added: that costs guesses, never correctness.
        """
        if name not in self.deltas.ups or not self._in_order(input_BTI):
            return
        layer_input, up_RO = input_BTI, self.deltas.ups[name]
        if input_BTI.dim() == 2:
            input_BTI, output_BTO = (tensor.unflatten(0, (-1, self.length)) for tensor in (input_BTI, output_BTO))
        drafts_BNI, sums_BNO = input_BTI[:, -self.tokens :], output_BTO[:, -self.tokens :]
        if len(sums_BNO) == 1:  # a plain matrix product is faster than a batched one
            drafts_BNI, sums_BNO = drafts_BNI[0], sums_BNO[0]
            sums_BNO.addmm_(self._reduced(name, layer_input, lambda down: drafts_BNI @ down.matrix_IR), up_RO)
        else:
            sums_BNO += self._reduced(name, layer_input, lambda down: drafts_BNI @ down.matrix_IR) @ up_RO

    def _in_order(self, input: torch.Tensor) -> bool:
        """Whether the input has the forward's rows and tokens, in one dimension or two."""
        return (input.dim() == 3 and input.shape[1] == self.length) or (input.dim() == 2 and len(input) % self.length == 0)

    def _reduced(self, name: str, layer_input: torch.Tensor, product: Callable[[Down], torch.Tensor]) -> torch.Tensor:
        """The ``product`` [..., R] with the layer's first matrix; ``layer_input`` identifies the group."""
        groups = self.deltas.groups
        if torch.compiler.is_compiling():
            return product(self.deltas.downs[name])
        if groups is None:
            self.inputs.append((name, layer_input))
        elif name in groups:
            group = groups[name]
            self.shared = layer_input, dict(zip(group.names, product(group.down).split(group.ranks, dim=-1)))
        if self.shared is not None and self.shared[0] is layer_input and name in self.shared[1]:
            return self.shared[1][name]
        return product(self.deltas.downs[name])
