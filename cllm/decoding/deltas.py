"""What a consistency adapter adds to the linear layers of a model while it decodes.

Shapes: B rows, T tokens of a forward, N draft tokens of each row, which come last; I inputs and O outputs of a layer, R rank.
"""

from __future__ import annotations

from itertools import groupby

import torch
from transformers import PreTrainedModel

from cllm.adapter import Adapter


class Deltas:
    """An adapter's matrices, each on its layer's device and in the model's dtype.

    Layers that were given the same input in the first forward, such as the projections of one attention, share a product from
    then on: that with their matrices side by side.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        adapter.check(model)
        layers = dict(model.named_modules())
        self.place = [(name, layers[name].weight.device, model.dtype) for name in adapter.down]
        self.pairs = {
            name: (adapter.down[name].to(device, dtype).T.contiguous(), adapter.up[name].to(device, dtype).T.contiguous())
            for name, device, dtype in self.place
        }
        self.groups: dict[str, Group] | None = None  # by the first of its layers; None until a forward has shown them

    def fit(self, model: PreTrainedModel) -> bool:
        """Whether the layers are where they were."""
        layers = dict(model.named_modules())
        return all(name in layers and layers[name].weight.device == device and model.dtype == dtype for name, device, dtype in self.place)

    def group(self, inputs: list[tuple[str, torch.Tensor]]) -> None:
        """Find the layers that share an input, from the layers of a forward in their order, each with what it was given."""
        alike = [[name for name, _ in run] for _, run in groupby(inputs, key=lambda item: id(item[1]))]
        self.groups = {names[0]: Group(names, self.pairs) for names in alike if len(names) > 1}


class Group:
    """The first matrices of layers with one input, side by side."""

    def __init__(self, names: list[str], pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.names, downs = names, [pairs[name][0] for name in names]
        self.ranks = [down.shape[1] for down in downs]
        self.down_IR = torch.cat(downs, dim=1)


class Drafting:
    """One forward with deltas on the last ``tokens`` of the ``length`` tokens of each row."""

    def __init__(self, deltas: Deltas, length: int, tokens: int) -> None:
        self.deltas, self.pairs, self.length, self.tokens = deltas, deltas.pairs, length, tokens
        self.inputs: list[tuple[str, torch.Tensor]] = []  # of the layers so far, while groups are not known
        self.shared: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None  # a group's input, and its layers' products

    def finish(self) -> None:
        """The forward has ended."""
        if self.deltas.groups is None and self.inputs:
            self.deltas.group(self.inputs)

    def add(self, name: str, input_BTI: torch.Tensor, output_BTO: torch.Tensor) -> None:
        """Add the layer's delta to its output, in place.

        Some models flatten rows and tokens into one dimension. An input of any other length, such as the tokens that one
        expert of a mixture gets, has lost its order, so nothing is added: a worse guess, never a wrong text.
        """
        pair = self.pairs.get(name)
        if pair is None:
            return
        own = input_BTI
        if input_BTI.dim() == 2 and len(input_BTI) % self.length == 0:
            input_BTI, output_BTO = (of.unflatten(0, (-1, self.length)) for of in (input_BTI, output_BTO))
        if input_BTI.dim() != 3 or input_BTI.shape[1] != self.length:
            return
        drafts_BNI, sums_BNO = input_BTI[:, -self.tokens :], output_BTO[:, -self.tokens :]
        if len(sums_BNO) == 1:  # matrices are multiplied faster than batches of them
            drafts_BNI, sums_BNO = drafts_BNI[0], sums_BNO[0]
            sums_BNO.addmm_(self._product(name, own, drafts_BNI), pair[1])
        else:
            sums_BNO += self._product(name, own, drafts_BNI) @ pair[1]

    def _product(self, name: str, own: torch.Tensor, drafts_BNI: torch.Tensor) -> torch.Tensor:
        """The draft tokens [B, N, R] or [N, R] after the layer's first matrix; ``own``: the layer's input as it was given."""
        groups = self.deltas.groups
        if torch.compiler.is_compiling():
            return drafts_BNI @ self.pairs[name][0]
        if groups is None:
            self.inputs.append((name, own))
        elif name in groups:
            group = groups[name]
            self.shared = own, dict(zip(group.names, (drafts_BNI @ group.down_IR).split(group.ranks, dim=-1)))
        if self.shared is not None and self.shared[0] is own and name in self.shared[1]:
            return self.shared[1][name]
        return drafts_BNI @ self.pairs[name][0]
