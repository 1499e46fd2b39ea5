"""The low-rank terms that a consistency adapter adds to a model's linear layers during decoding.

Shapes: B rows, T tokens of a forward, the last N of which are draft tokens; I inputs and O outputs of a layer, R rank.
"""

from __future__ import annotations

from itertools import groupby

import torch
from transformers import PreTrainedModel

from cllm.adapter import Adapter


class Deltas:
    """An adapter's matrices, each on its layer's device and in the model's dtype.

    Layers that got the same input tensor in the first forward, such as the query, key and value projections, share one
    product with their concatenated first matrices from then on.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        adapter.check(model)
        layers = dict(model.named_modules())
        self.placement = [(name, layers[name].weight.device, model.dtype) for name in adapter.down]
        self.pairs = {
            name: (adapter.down[name].to(device, dtype).T.contiguous(), adapter.up[name].to(device, dtype).T.contiguous())
            for name, device, dtype in self.placement
        }
        self.groups: dict[str, Group] | None = None  # by the name of their first layer; None before the first forward

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the layers still have the device and dtype of the matrices."""
        layers = dict(model.named_modules())
        return all(
            name in layers and layers[name].weight.device == device and model.dtype == dtype for name, device, dtype in self.placement
        )

    def group(self, inputs: list[tuple[str, torch.Tensor]]) -> None:
        """Group the layers by input. ``inputs``: name and input tensor of each adapted layer, in the order of the forward."""
        shared = [[name for name, _ in run] for _, run in groupby(inputs, key=lambda item: id(item[1]))]
        self.groups = {names[0]: Group(names, self.pairs) for names in shared if len(names) > 1}


class Group:
    """The first matrices of the layers that share an input, concatenated."""

    def __init__(self, names: list[str], pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.names, downs = names, [pairs[name][0] for name in names]
        self.ranks = [down.shape[1] for down in downs]
        self.down_IR = torch.cat(downs, dim=1)


class DraftPass:
    """One forward with deltas on the last ``tokens`` of the ``length`` tokens of each row."""

    def __init__(self, deltas: Deltas, length: int, tokens: int) -> None:
        self.deltas, self.pairs, self.length, self.tokens = deltas, deltas.pairs, length, tokens
        self.inputs: list[tuple[str, torch.Tensor]] = []  # of the layers so far, recorded only in the first forward
        self.shared: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None  # the latest group's input and products

    def finish(self) -> None:
        """To be called after the forward."""
        if self.deltas.groups is None and self.inputs:
            self.deltas.group(self.inputs)

    def add(self, name: str, input_BTI: torch.Tensor, output_BTO: torch.Tensor) -> None:
        """Add the layer's delta to its output, in place.

        Some models flatten rows and tokens into one dimension. An input of any other length, such as the tokens routed to
        one expert of a mixture, has lost its order, so nothing is added: that costs guesses, never correctness.
        """
        pair = self.pairs.get(name)
        if pair is None:
            return
        layer_input = input_BTI
        if input_BTI.dim() == 2 and len(input_BTI) % self.length == 0:
            input_BTI, output_BTO = (tensor.unflatten(0, (-1, self.length)) for tensor in (input_BTI, output_BTO))
        if input_BTI.dim() != 3 or input_BTI.shape[1] != self.length:
            return
        drafts_BNI, sums_BNO = input_BTI[:, -self.tokens :], output_BTO[:, -self.tokens :]
        if len(sums_BNO) == 1:  # a plain matrix product is faster than a batched one
            drafts_BNI, sums_BNO = drafts_BNI[0], sums_BNO[0]
            sums_BNO.addmm_(self._product(name, layer_input, drafts_BNI), pair[1])
        else:
            sums_BNO += self._product(name, layer_input, drafts_BNI) @ pair[1]

    def _product(self, name: str, layer_input: torch.Tensor, drafts_BNI: torch.Tensor) -> torch.Tensor:
        """The draft tokens times the layer's first matrix, [B, N, R] or [N, R]; ``layer_input`` identifies the group."""
        groups = self.deltas.groups
        if torch.compiler.is_compiling():
            return drafts_BNI @ self.pairs[name][0]
        if groups is None:
            self.inputs.append((name, layer_input))
        elif name in groups:
            group = groups[name]
            self.shared = layer_input, dict(zip(group.names, (drafts_BNI @ group.down_IR).split(group.ranks, dim=-1)))
        if self.shared is not None and self.shared[0] is layer_input and name in self.shared[1]:
            return self.shared[1][name]
        return drafts_BNI @ self.pairs[name][0]
