"""The output layer outside the model's forward, so that logits exist only where a loss needs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from cllm.errors import UnsupportedModelError


class LanguageHead:
    """The output layer of a causal language model: hidden states [..., H] to float32 logits [..., V].

    Applies the final soft-capping of Gemma models. :meth:`verify` detects any other operation that a model applies after its
    output layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layer = model.get_output_embeddings()
        self.config = model.config
        self.name = model.config.model_type
        self.cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)

    @property
    def parameters(self) -> list[torch.Tensor]:
        return list(self.layer.parameters())

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = type(self.layer).forward(self.layer, hidden)  # bypasses FSDP's hooks; the weights are already unsharded
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits.float()

    def with_full_weights(self, work: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """``work(hidden)`` with the layer's weights unsharded.

        Under DeepSpeed ZeRO-3, ``work`` runs inside a call of the layer, whose hooks gather the weights for the forward and
        again for the backward.
        """
        if not any(hasattr(parameter, "ds_tensor") for parameter in self.parameters):
            return work(hidden)
        self.layer.forward = work
        try:
            return self.layer(hidden)
        finally:
            del self.layer.forward

    @torch.no_grad()
    def verify(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Raise UnsupportedModelError unless the layer maps ``hidden`` [B, T, H] to the model's own ``logits`` [B, T, V]."""
        own = self.with_full_weights(self, hidden)
        rounded = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype != torch.float32
        tolerance = 5e-2 if rounded else 1e-3
        if not torch.allclose(own, logits.float(), rtol=tolerance, atol=tolerance * float(own.abs().max())):
            raise UnsupportedModelError(
                f"the logits of {self.name} are not its output layer applied to its last hidden states, which training needs"
            )
