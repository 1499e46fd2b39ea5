"""Training of a consistency adapter, which drafts for an unchanged target model.

Shapes: B texts, C longest clean text, T longest run of blocks, H hidden size, M tokens in the loss; the clean texts in G rows of
L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from cllm.attention import MASKABLE
from cllm.errors import UsageError
from cllm.modes import evaluating
from cllm.packing import Layout, packed_mask
from cllm.training.arguments import NO_CHECKPOINTING, LosslessTrainingArguments
from cllm.training.base import Batch, TokenMeanTrainer, hidden_at
from cllm.training.drafts import CLEAN_TEXT
from cllm.training.examples import batch_layout
from cllm.training.head import LanguageHead
from cllm.training.lora import has_adapter
from cllm.training.objective import distillation_sum


@dataclass(frozen=True)
class _CleanText:
    """The target model's pass over the clean text: the teacher's hidden states and the cache that blocks attend to."""

    layout: Layout  # of the whole batch [B, C + T]
    hidden_GLH: torch.Tensor
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]  # of each layer, C positions of each text


class LosslessTrainer(TokenMeanTrainer):
    """Trains an adapter, enabled on blocks only, to predict the target's own distribution on the clean text.

    The target (the model with its adapter disabled) reads the clean text once, without gradients; then one forward carries
    all blocks over its keys and values. The loss is the consistency term (paper, equation 1) with forward KL, strictly after
    the first wrong guess; a token d places after it weighs ``distance_decay**d``.

    Raises ValueError for a model without an adapter, UsageError for activation checkpointing under FSDP.
    """

    terms = ("consistency_loss",)
    attention = MASKABLE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args: LosslessTrainingArguments
        if not has_adapter(self.model):
            raise ValueError("lossless training needs a model with an adapter, see cllm.training.lora.add_adapter")
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.activation_checkpointing:
            raise UsageError(f"fsdp_activation_checkpointing is on: {NO_CHECKPOINTING}")

    def counts(self, batch: Batch) -> torch.Tensor:
        return self._weight(batch).sum()[None]

    def computed(self, batch: Batch) -> torch.Tensor:
        blocks = batch["block"][:, -batch["input_ids"].shape[1] :]
        return torch.cat([batch[CLEAN_TEXT + "block"].flatten(), blocks.flatten()])

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        unwrapped = self.accelerator.unwrap_model(model)
        head = LanguageHead(unwrapped)
        text = self._read_clean(unwrapped, head, batch)
        loss = distillation_sum(
            hidden_at(self._read_blocks(model, head, text, batch), batch["student"]),
            head,
            hidden_at(text.hidden_GLH, batch["teacher"]),
            head,
            self._weight(batch),
            teacher_row_M=batch["teacher_row"],
        )
        return loss[None]

    def _weight(self, batch: Batch) -> torch.Tensor:
        return self.args.distance_decay ** batch["distance"].float()

    @torch.no_grad()
    def _read_clean(self, model: Any, head: LanguageHead, batch: Batch) -> _CleanText:
        clean, cache = batch_layout(batch, CLEAN_TEXT), DynamicCache()
        with _as_target(model):
            hidden_GLH = self._forward(model, head, batch[CLEAN_TEXT + "input_ids"], clean, clean, cache)
        row_BC, column_BC = batch["clean_place"].unbind(dim=-1)
        layers: Any = cache.layers
        keys_values = [tuple(part[row_BC, :, column_BC].transpose(1, 2) for part in (layer.keys, layer.values)) for layer in layers]
        return _CleanText(batch_layout(batch), hidden_GLH, keys_values)

    def _read_blocks(self, model: torch.nn.Module, head: LanguageHead, text: _CleanText, batch: Batch) -> torch.Tensor:
        """Last hidden states [B, T, H] of the blocks."""
        ids_BT = batch["input_ids"]
        blocks = text.layout.columns(slice(-ids_BT.shape[1], None))
        return self._forward(model, head, ids_BT, blocks, text.layout, DynamicCache(text.keys_values))

    def _forward(
        self, model: torch.nn.Module, head: LanguageHead, ids: torch.Tensor, queries: Layout, keys: Layout, cache: DynamicCache
    ) -> torch.Tensor:
        mask = packed_mask(head.config, queries, keys, head.layer.weight.dtype)
        return self.last_hidden(model, head, cache, input_ids=ids, attention_mask=mask, position_ids=queries.position_BT)


@contextmanager
def _as_target(model: Any) -> Iterator[None]:
    """Make a model with an adapter act as the target: adapter and dropout disabled."""
    with model.disable_adapter(), evaluating(model):
        yield
