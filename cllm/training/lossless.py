"""The training of a consistency adapter, which drafts for a target model that stays as it is.

Shapes: B texts, C longest clean text, T longest run of blocks, H hidden size, M tokens that the loss is taken at.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from cllm.attention import MASKABLE, check_model
from cllm.errors import UsageError
from cllm.packing import PADDING, Layout, packed_mask
from cllm.training.arguments import NO_CHECKPOINTING, LosslessTrainingArguments
from cllm.training.base import Batch, TokenMeanTrainer, at
from cllm.training.examples import batch_layout, clean_columns
from cllm.training.head import LanguageHead
from cllm.training.lora import adapted
from cllm.training.objective import DIVERGENCES, choices, distillation_sum


@dataclass(frozen=True)
class _Text:
    """The clean text as the target model reads it: what blocks see of it, and what they learn from."""

    layout: Layout  # of the whole batch [B, C + T]
    hidden_BCH: torch.Tensor
    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, C of each text


class LosslessTrainer(TokenMeanTrainer):
    """Trains an adapter, on for the blocks only, towards the target's own distribution on the clean text.

    The target, the model with its adapter off, reads the clean text once, without gradients; then all blocks go over its
    keys and values in one forward. Loss: the consistency term (paper, equation 1), strictly after the first wrong guess, a
    token d places after it weighing ``distance_decay**d``. In a share ``on_policy`` of the steps the adapter first takes
    the states one iteration further, as windows look from the second iteration on; the first wrong guess stays.
    """

    terms = ("consistency_loss",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args: LosslessTrainingArguments
        check_model(self.model, MASKABLE)
        if not adapted(self.model):
            raise ValueError("lossless training needs a model with an adapter, see cllm.training.lora.adapt")
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.activation_checkpointing:
            raise UsageError(f"fsdp_activation_checkpointing is on: {NO_CHECKPOINTING}")

    def counts(self, batch: Batch) -> torch.Tensor:
        return self._weight(batch).sum()[None]

    def useful_tokens(self, batch: Batch) -> torch.Tensor:
        return (batch["block"] != PADDING).sum()

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        own = self.accelerator.unwrap_model(model)
        head = LanguageHead(own)
        text = self._read(own, head, batch)
        ids_BT = batch["input_ids"][:, clean_columns(batch) :]
        if model.training and self.on_policy:
            ids_BT = self._advanced(own, head, batch, text, ids_BT)
        loss = distillation_sum(
            at(self._draft(model, head, text, ids_BT), batch["student"]),
            head,
            at(text.hidden_BCH, batch["teacher"]),
            head,
            self._weight(batch),
            DIVERGENCES[self.args.divergence],
            batch["goal"],
        )
        return loss[None]

    @property
    def on_policy(self) -> bool:
        """Whether this step's states are taken on; alike in all processes, all parts of the batch, and a resumed run."""
        return random.Random(f"{self.args.seed} {self.state.global_step}").random() < self.args.on_policy

    def _weight(self, batch: Batch) -> torch.Tensor:
        return self.args.distance_decay ** batch["distance"].float()

    @torch.no_grad()
    def _read(self, own: Any, head: LanguageHead, batch: Batch) -> _Text:
        layout, first, cache = batch_layout(batch), slice(clean_columns(batch)), DynamicCache()
        clean = layout.columns(first)
        with _target(own):
            hidden_BCH = self._forward(own, head, batch["input_ids"][:, first], clean, clean, cache)
        layers: Any = cache.layers
        return _Text(layout, hidden_BCH, [(layer.keys, layer.values) for layer in layers])

    def _draft(self, model: torch.nn.Module, head: LanguageHead, text: _Text, ids_BT: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, T, H] of the blocks."""
        blocks = text.layout.columns(slice(text.hidden_BCH.shape[1], None))
        return self._forward(model, head, ids_BT, blocks, text.layout, DynamicCache(text.pairs))

    def _forward(
        self, model: torch.nn.Module, head: LanguageHead, ids: torch.Tensor, queries: Layout, keys: Layout, cache: DynamicCache
    ) -> torch.Tensor:
        mask = packed_mask(head.config, queries, keys, head.layer.weight.dtype)
        return self.last_hidden(model, head, cache, input_ids=ids, attention_mask=mask, position_ids=queries.position_BT)

    @torch.no_grad()
    def _advanced(self, own: Any, head: LanguageHead, batch: Batch, text: _Text, ids_BT: torch.Tensor) -> torch.Tensor:
        """The blocks with the adapter's own choices after their first wrong guesses."""
        later = batch["distance"].nonzero()[:, 0]  # each follows another token of its block
        rows, columns = batch["student"][later].T
        hidden_BTH = self._draft(own, head, text, ids_BT)
        taken = choices(at(hidden_BTH, batch["student"][later - 1]), head)
        return ids_BT.index_put((rows, columns), taken)


@contextmanager
def _target(own: Any) -> Iterator[None]:
    """Meanwhile a model with an adapter is the target model: adapter off, dropout off."""
    training = own.training
    with own.disable_adapter():
        own.eval()
        try:
            yield
        finally:
            own.train(training)
