"""``transformers.Trainer`` with the CLLM objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from cllm.attention import FLEX, TRAINABLE, check_model
from cllm.errors import UsageError
from cllm.packing import PADDING
from cllm.training.arguments import CllmTrainingArguments
from cllm.training.base import Batch, TokenMeanTrainer, at
from cllm.training.examples import clean_columns
from cllm.training.head import LanguageHead
from cllm.training.lora import adapted
from cllm.training.objective import DIVERGENCES, cross_entropy_sum, distillation_sum


class CllmTrainer(TokenMeanTrainer):
    """Fine-tunes a target model into a CLLM: loss = consistency + ar_weight * AR (paper, equation 5).

    One packed forward and one backward per step at any batch size.

    ``target_model``: the frozen target, needed where ``args.teacher`` or ``args.ar_loss`` is ``target``; a model with LoRA
    adapters is its own target with the adapters off.
    """

    terms = ("consistency_loss", "ar_loss")

    def __init__(self, *args: Any, target_model: PreTrainedModel | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args: CllmTrainingArguments
        check_model(self.model, TRAINABLE)
        if self.model.config._attn_implementation == FLEX and self.args.device.type == "cpu":
            raise UsageError(f"attn_implementation {FLEX} has no backward pass on a CPU; use sdpa there")
        if self.args.needs_target and target_model is None and not adapted(self.model):
            raise ValueError("teacher='target' and ar_loss='target' need target_model")
        self.target_model = target_model
        if target_model is not None:
            target_model.requires_grad_(False).eval().to(self.args.device)

    @property
    def weights(self) -> tuple[float, float]:
        return 1.0, self.args.ar_weight

    def counts(self, batch: Batch) -> torch.Tensor:
        """Weights of the consistency tokens, and the number of AR tokens."""
        return torch.stack([batch["weight"].sum(), batch["weight"].new_tensor(float(len(batch["ar_target"])))])

    def useful_tokens(self, batch: Batch) -> torch.Tensor:
        return (batch["block"] != PADDING).sum()

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Consistency and AR loss of a batch as weighted sums over its tokens: [2]."""
        student_head = LanguageHead(self.accelerator.unwrap_model(model))
        hidden = self.packed_hidden(model, batch, student_head)
        target_hidden, target_head = hidden.detach(), student_head
        if self.args.needs_target:
            with self._target(model) as target, torch.no_grad():
                target_head = LanguageHead(target)
                target_hidden = self.packed_hidden(target, self._target_view(batch), target_head)
        by_target = self.args.teacher == "target"
        consistency = distillation_sum(
            at(hidden, batch["student"]),
            student_head,
            at(target_hidden if by_target else hidden, batch["teacher"]),
            target_head if by_target else student_head,
            batch["weight"],
            DIVERGENCES[self.args.divergence],
        )
        ar_hidden = at(hidden, batch["ar_index"])
        if self.args.ar_loss == "target":
            weight = torch.ones(len(ar_hidden), device=ar_hidden.device)
            ar = distillation_sum(ar_hidden, student_head, at(target_hidden, batch["ar_index"]), target_head, weight)
        else:
            ar = cross_entropy_sum(ar_hidden, student_head, batch["ar_target"], self.args.label_smoothing_factor)
        return torch.stack([consistency, ar])

    @contextmanager
    def _target(self, model: torch.nn.Module) -> Iterator[PreTrainedModel]:
        """The frozen target, ready to be called."""
        if self.target_model is not None:
            yield self.target_model
        else:
            own = self.accelerator.unwrap_model(model)
            with own.disable_adapter():
                yield own

    def _target_view(self, batch: Batch) -> Batch:
        """What the frozen target has to look at: the clean text, and the blocks only where they teach (local consistency)."""
        if self.args.consistency == "local":
            return batch
        columns = clean_columns(batch)
        return {name: batch[name][:, :columns] for name in ("input_ids", "position", "horizon", "block", "document")}
