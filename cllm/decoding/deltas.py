"""What a consistency adapter adds to the linear layers of a model while it decodes.

Shapes: B rows, T tokens of a forward, N draft tokens of each row, which come last; I inputs and O outputs of a layer, R rank.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from cllm.adapter import Adapter


class Deltas:
    """An adapter's matrices, each on its layer's device and in the model's dtype."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        adapter.check(model)
        layers = dict(model.named_modules())
        self.place = [(name, layers[name].weight.device, model.dtype) for name in adapter.down]
        self.pairs = {
            name: (adapter.down[name].to(device, dtype).T.contiguous(), adapter.up[name].to(device, dtype).T.contiguous())
            for name, device, dtype in self.place
        }

    def fit(self, model: PreTrainedModel) -> bool:
        """Whether the layers are where they were."""
        layers = dict(model.named_modules())
        return all(
            name in layers and layers[name].weight.device == device and model.dtype == dtype
            for name, device, dtype in self.place
        )


class Drafting:
    """Deltas on the last ``tokens`` of ``length`` tokens of each row."""

    def __init__(self, deltas: Deltas, length: int, tokens: int) -> None:
        self.pairs, self.length, self.tokens = deltas.pairs, length, tokens

    def add(self, name: str, input_BTI: torch.Tensor, output_BTO: torch.Tensor) -> None:
        """Add the layer's delta to its output, in place.

        Some models flatten rows and tokens into one dimension. An input of any other length, such as the tokens that one
        expert of a mixture gets, has lost its order, so nothing is added: a worse guess, never a wrong text.
        """
        pair = self.pairs.get(name)
        if pair is None:
            return
        if input_BTI.dim() == 2 and len(input_BTI) % self.length == 0:
            input_BTI, output_BTO = (of.unflatten(0, (-1, self.length)) for of in (input_BTI, output_BTO))
        if input_BTI.dim() != 3 or input_BTI.shape[1] != self.length:
            return
        down_IR, up_RO = pair
        drafts_BNI, sums_BNO = input_BTI[:, -self.tokens :], output_BTO[:, -self.tokens :]
        if len(input_BTI) == 1:
            sums_BNO[0].addmm_(drafts_BNI[0] @ down_IR, up_RO)
        else:
            sums_BNO += drafts_BNI @ down_IR @ up_RO
