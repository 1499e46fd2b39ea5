"""``transformers.Trainer`` with the CLLM objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from cllm.training.arguments import CllmTrainingArguments
from cllm.training.base import Batch, TokenMeanTrainer, hidden_at
from cllm.training.examples import clean_columns
from cllm.training.head import LanguageHead
from cllm.training.lora import has_adapter
from cllm.training.objective import DIVERGENCES, cross_entropy_sum, distillation_sum


class CllmTrainer(TokenMeanTrainer):
    """Fine-tunes a target model into a CLLM: loss = consistency + ar_weight * AR (paper, equation 5).

    One packed forward and one backward per micro-batch.

    ``target_model`` is the frozen target, needed where ``args.teacher`` or ``args.ar_loss`` is ``target``. A model with a LoRA
    adapter needs none: with the adapter disabled it is the target.

    Raises ValueError where the target is missing.
    """

    terms = ("consistency_loss", "ar_loss")

    def __init__(self, *args: Any, target_model: PreTrainedModel | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args: CllmTrainingArguments
        if self.args.needs_target and target_model is None and not has_adapter(self.model):
            raise ValueError("teacher='target' and ar_loss='target' need target_model")
        self.target_model = target_model
        if target_model is not None:
            target_model.requires_grad_(False).eval().to(self.args.device)

    @property
    def weights(self) -> tuple[float, float]:
        return 1.0, self.args.ar_weight

    def counts(self, batch: Batch) -> torch.Tensor:
        """Sum of the consistency weights, and number of AR tokens: [2]."""
        return torch.stack([batch["weight"].sum(), batch["weight"].new_tensor(float(len(batch["ar_target"])))])

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Consistency and AR loss as weighted sums over the tokens of a batch: [2]."""
        student_head = LanguageHead(self.accelerator.unwrap_model(model))
        hidden = self.packed_hidden(model, batch, student_head)
        target_hidden, target_head = hidden.detach(), student_head
        if self.args.needs_target:
            with self._target(model) as target, torch.no_grad():
                target_head = LanguageHead(target)
                target_hidden = self.packed_hidden(target, self._target_view(batch), target_head)
        by_target = self.args.teacher == "target"
        consistency = distillation_sum(
            hidden_at(hidden, batch["student"]),
            student_head,
            hidden_at(target_hidden if by_target else hidden, batch["teacher"]),
            target_head if by_target else student_head,
            batch["weight"],
            DIVERGENCES[self.args.divergence],
        )
        ar_hidden = hidden_at(hidden, batch["ar_index"])
        if self.args.ar_loss == "target":
            weight = torch.ones(len(ar_hidden), device=ar_hidden.device)
            ar = distillation_sum(ar_hidden, student_head, hidden_at(target_hidden, batch["ar_index"]), target_head, weight)
        else:
            ar = cross_entropy_sum(ar_hidden, student_head, batch["ar_target"], self.args.label_smoothing_factor)
        return torch.stack([consistency, ar])

    @contextmanager
    def _target(self, model: torch.nn.Module) -> Iterator[PreTrainedModel]:
        """The frozen target model, for use in a ``with`` statement."""
        if self.target_model is not None:
            yield self.target_model
        else:
            unwrapped = self.accelerator.unwrap_model(model)
            with unwrapped.disable_adapter():
                yield unwrapped

    def _target_view(self, batch: Batch) -> Batch:
        """The part of a batch that the target reads: the clean text, and for local consistency also the blocks."""
        if self.args.consistency == "local":
            return batch
        columns = clean_columns(batch)
        return {name: batch[name][:, :columns] for name in ("input_ids", "position", "horizon", "block", "document")}
