"""``transformers.Trainer`` with the CLLM objective; everything else stays the parent's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from cllm.attention import check_model
from cllm.packing import packed_mask
from cllm.training.arguments import CllmTrainingArguments
from cllm.training.examples import ExampleDataset, batch_layout
from cllm.training.head import LanguageHead
from cllm.training.objective import cross_entropy_sum, distillation_sum

Batch = dict[str, torch.Tensor]


class CllmTrainer(Trainer):
    """Fine-tunes a target model into a CLLM: loss = consistency + ar_weight * AR (paper, equation 5).

    One packed forward and one backward per step at any batch size. Both terms are means over the tokens of the global batch
    (all processes, all accumulated micro-batches), so its split does not change the gradient.

    ``target_model``: the frozen target, needed where ``args.teacher`` or ``args.ar_loss`` is ``target``.
    """

    def __init__(self, *args: Any, target_model: PreTrainedModel | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args: CllmTrainingArguments
        self.model: PreTrainedModel
        check_model(self.model)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the global batch's token counts here
        if self.args.needs_target and target_model is None:
            raise ValueError("teacher='target' and ar_loss='target' need target_model")
        self.target_model = target_model
        if target_model is not None:
            target_model.requires_grad_(False).eval().to(self.args.device)
        if isinstance(self.train_dataset, ExampleDataset):
            self.add_callback(_EpochCallback(self.train_dataset))
        self._verified = False
        self._parts: list[torch.Tensor] = []

    # ------------------------------------------------- what the parent calls

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step and the token counts (consistency, AR) of the global batch."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        counts = torch.stack([_counts(batch) for batch in batches]).sum(dim=0) if batches else torch.zeros(2)
        return batches, self.accelerator.reduce(counts.to(device), reduction="sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """The loss of one micro-batch, as its share of the global batch's mean."""
        counts = num_items_in_batch if isinstance(num_items_in_batch, torch.Tensor) else _counts(inputs)
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes  # gradients are averaged over them
        sums = torch.stack(self.loss_sums(model, inputs))
        parts = sums * processes / counts.to(sums.device).clamp(min=1e-9)
        if model.training:
            self._parts.append(parts.detach())
        loss = parts[0] + self.args.ar_weight * parts[1]
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation reports the same loss."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the two terms to the parent's log, as means over the steps since the last one."""
        if self._parts and "loss" in logs:
            steps = len(self._parts) / self.args.gradient_accumulation_steps
            mean = self.accelerator.reduce(torch.stack(self._parts).sum(dim=0) / steps, reduction="mean")
            logs["consistency_loss"], logs["ar_loss"] = mean.tolist()
            self._parts.clear()
        super().log(logs, start_time)

    # --------------------------------------------------------- the objective

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Consistency and AR loss of a batch as weighted sums over its tokens."""
        student_head = LanguageHead(self.accelerator.unwrap_model(model))
        hidden = self._hidden(model, batch, student_head)
        target_hidden, target_head = hidden.detach(), student_head
        if self.target_model is not None:
            target_head = LanguageHead(self.target_model)
            with torch.no_grad():
                target_hidden = self._hidden(self.target_model, self._target_view(batch), target_head)
        by_target = self.args.teacher == "target"
        consistency = distillation_sum(
            _at(hidden, batch["student"]),
            student_head,
            _at(target_hidden if by_target else hidden, batch["teacher"]),
            target_head if by_target else student_head,
            batch["weight"],
        )
        ar_hidden = _at(hidden, batch["ar_index"])
        if self.args.ar_loss == "target":
            weight = torch.ones(len(ar_hidden), device=ar_hidden.device)
            ar = distillation_sum(
                ar_hidden, student_head, _at(target_hidden, batch["ar_index"]), target_head, weight
            )
        else:
            ar = cross_entropy_sum(ar_hidden, student_head, batch["ar_target"])
        return consistency, ar

    def _hidden(self, model: torch.nn.Module, batch: Batch, head: LanguageHead) -> torch.Tensor:
        """Last hidden states [B, T, H] of a packed batch, through the model's public forward."""
        layout = batch_layout(batch)
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=packed_mask(self.model.config, layout, layout, head.layer.weight.dtype),
            position_ids=layout.position_BT,
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        hidden = output.hidden_states[-1]
        if not self._verified:
            head.verify(hidden[:, -1:], output.logits[:, -1:])
            self._verified = True
        return hidden

    def _target_view(self, batch: Batch) -> Batch:
        """What the frozen target has to look at: the clean text, and the blocks only where they teach (local consistency)."""
        if self.args.consistency == "local":
            return batch
        columns = int(((batch["block"] == 0).sum(dim=1)).max())
        return {name: batch[name][:, :columns] for name in ("input_ids", "position", "horizon", "block")}


def _at(hidden_BTH: torch.Tensor, pairs_M2: torch.Tensor) -> torch.Tensor:
    return hidden_BTH[pairs_M2[:, 0], pairs_M2[:, 1]]


def _counts(batch: Batch) -> torch.Tensor:
    """How much a batch weighs in the two means."""
    return torch.stack([batch["weight"].sum(), batch["weight"].new_tensor(float(len(batch["ar_target"])))])


class _EpochCallback(TrainerCallback):
    """Tells the dataset which epoch it is; data loaders of several processes do not."""

    def __init__(self, dataset: ExampleDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))
