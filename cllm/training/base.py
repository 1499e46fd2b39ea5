"""The base of all trainers: ``transformers.Trainer`` with losses that are means over the tokens of the global batch.

Shapes: B rows, T tokens, H hidden size, L terms of the loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Cache, PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import is_liger_kernel_available

from cllm.attention import FLEX, TRAINABLE, cache_argument, check_model
from cllm.errors import UsageError
from cllm.packing import PADDING, packed_mask
from cllm.training.examples import batch_layout
from cllm.training.head import LanguageHead
from cllm.training.heap import HeapCallback
from cllm.training.lora import has_adapter
from cllm.training.meter import Meter
from cllm.training.sampler import LengthGroupedSampler

Batch = dict[str, torch.Tensor]


class TokenMeanTrainer(Trainer):
    """Loss = weighted sum of terms, each a mean over the tokens of the global batch.

    The global batch is that of all processes and accumulated micro-batches, so splitting it differently leaves the gradient
    unchanged. Logits are computed only at tokens that a loss reads. ``--train_sampling_strategy group_by_length`` gives an
    order that a resumed run repeats. Everything else is inherited.

    Raises UnsupportedModelError for a model that cannot take packed masks; UsageError for options that cannot work here, and when
    the loss or the weights stop being finite.
    """

    terms: tuple[str, ...]  # names of the loss terms in the log
    attention: tuple[str, ...] = TRAINABLE  # implementations that the forwards work with

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model: PreTrainedModel
        check_model(self.model, self.attention)
        if self.model.config._attn_implementation == FLEX and self.args.device.type == "cpu":
            raise UsageError(f"attn_implementation {FLEX} has no backward pass on a CPU; use sdpa or eager there")
        self.model_accepts_loss_kwargs = True  # the loss is divided by the global batch's token counts here
        self.length_sampler: LengthGroupedSampler | None = None
        self.add_callback(_ProgressCallback(self))
        self.add_callback(HeapCallback())
        self.meter = Meter()
        if self.args.use_liger_kernel and (self.args.device.type == "cpu" or not is_liger_kernel_available()):
            raise UsageError("use_liger_kernel needs a GPU and the package liger-kernel; leave it out")
        if self.args.dataloader_persistent_workers:
            raise UsageError("dataloader_persistent_workers would repeat the first epoch's examples in every epoch; leave it out")
        self._head_verified = False
        self._pending_terms: list[torch.Tensor] = []  # [L] of every micro-batch since the last log
        self._steps = 0  # since the last log
        self._eval_totals: list[torch.Tensor] = []  # sums and counts [2, L] of every evaluation batch

    # ------------------------------------------------------ for the subclass

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each term: [L]."""
        return (1.0,) * len(self.terms)

    @abstractmethod
    def counts(self, batch: Batch) -> torch.Tensor:
        """The denominator of each term's mean for one batch: [L]."""

    @abstractmethod
    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Each term as a weighted sum over the tokens of one batch: [L]."""

    def computed(self, batch: Batch) -> torch.Tensor:
        """The block numbers of all tokens that a step over one batch computes, padding included; of any shape."""
        return batch["block"]

    def last_hidden(self, model: torch.nn.Module, head: LanguageHead, cache: Cache | None = None, **inputs: Any) -> torch.Tensor:
        """Last hidden states [B, T, H] from the model's public forward, which continues and extends ``cache``.

        The first call also checks that ``head`` reproduces the model's logits (:meth:`LanguageHead.verify`).
        """
        inputs |= {cache_argument(self.model): cache, "use_cache": cache is not None}
        kept: list[int] = [] if self._head_verified else [-1]  # positions whose logits the model computes
        inputs["logits_to_keep"] = torch.tensor(kept, dtype=torch.long, device=inputs["input_ids"].device)
        output = model(**inputs, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        if not self._head_verified:
            head.verify(hidden[:, -1:], output.logits[:, -1:])
            self._head_verified = True
        return hidden

    def packed_hidden(self, model: torch.nn.Module, batch: Batch, head: LanguageHead) -> torch.Tensor:
        """Last hidden states [B, T, H] of a packed batch."""
        layout = batch_layout(batch)
        mask = packed_mask(head.config, layout, layout, head.layer.weight.dtype)
        return self.last_hidden(model, head, input_ids=batch["input_ids"], attention_mask=mask, position_ids=layout.position_BT)

    # -------------------------------------------- overridden methods of Trainer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step and the token counts [L] of the global batch."""
        self.meter.start()
        self._steps += 1
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        counts = torch.stack([self.counts(batch) for batch in batches]).sum(dim=0) if batches else torch.zeros(len(self.terms))
        return batches, self.accelerator.reduce(counts.to(device), reduction="sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """The loss of one micro-batch: its share of the global batch's mean."""
        counts = num_items_in_batch if isinstance(num_items_in_batch, torch.Tensor) else self.counts(inputs)
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes  # gradients are averaged over them
        sums = self.loss_sums(model, inputs)
        parts = processes * _means(sums, counts)
        if model.training:
            self._pending_terms.append(parts.detach())
            block = self.computed(inputs)
            self.meter.count(block.numel(), (block != PADDING).sum())
        loss = self._weighted(parts)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of one evaluation batch; :meth:`evaluation_loop` averages over all of them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.loss_sums(model, inputs)
        self._eval_totals.append(torch.stack([sums, self.counts(inputs).to(sums)]))
        return self._weighted(_means(*self._eval_totals[-1])), None, None

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        """The parent's loop; each term of the loss is a mean over the tokens of the whole set.

        With several processes, the last batches are filled up with examples from the start of the set, which count again.
        """
        self._eval_totals.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        totals = self.accelerator.reduce(torch.stack(self._eval_totals).sum(dim=0), reduction="sum")
        loss = {f"{metric_key_prefix}_loss": self._weighted(_means(*totals)).item()}
        return output._replace(metrics=(output.metrics or {}) | loss)

    def _weighted(self, parts: torch.Tensor) -> torch.Tensor:
        """The loss [] from its terms [L]."""
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """Autocast for the whole loss, including what runs outside the prepared model's forward (output layer, target).

        Inside it, adapters do not cast their inputs to float32, since autocast would cast them back.
        """
        stack = ExitStack()
        stack.enter_context(self.accelerator.autocast())
        if self.accelerator.native_amp and has_adapter(self.model):
            from peft.helpers import disable_input_dtype_casting

            stack.enter_context(disable_input_dtype_casting(self.model))
        return stack

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's log, plus throughput and (if there are several) the mean of each term since the last log."""
        if self._pending_terms and "loss" in logs:
            mean = self._mean_pending_terms()
            if len(self.terms) > 1:
                logs |= dict(zip(self.terms, mean))
            logs |= self.meter.read(self.accelerator.num_processes)
            self.discard_pending_terms()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the parent does, but never a model that has diverged, and the final result of FSDP unsharded.

        Beside an adapter it writes config.json, whose record says how to prompt the model and whether the adapter may be
        merged. Raises UsageError where the loss or a weight is not finite.
        """
        self._mean_pending_terms()
        unfit = [name for name, weight in self.model.named_parameters() if not _is_finite(weight)]
        if unfit:
            raise self._diverged(f"the weights in {unfit[0]} are")
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and has_adapter(self.model):
            self.model.config.save_pretrained(str(output_dir or self.args.output_dir))

    def discard_pending_terms(self) -> None:
        """Leave the steps so far out of the next log."""
        self._pending_terms.clear()
        self._steps = 0

    def _mean_pending_terms(self) -> list[float]:
        """The mean of each term since the last log, the same on all processes. Raises UsageError where it is not finite."""
        if not self._pending_terms:
            return []
        mean = self.accelerator.reduce(torch.stack(self._pending_terms).sum(dim=0) / max(self._steps, 1), reduction="mean")
        if not mean.isfinite().all():
            raise self._diverged("the loss is")
        return mean.tolist()

    def _diverged(self, what: str) -> UsageError:
        return UsageError(
            f"{what} no longer finite at step {self.state.global_step}, so training has stopped; earlier checkpoints in "
            f"{self.args.output_dir} are kept. Lower --learning_rate ({self.args.learning_rate:g}) or "
            f"--max_grad_norm ({self.args.max_grad_norm:g}), or raise --warmup_steps"
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        self.length_sampler = LengthGroupedSampler(dataset, self.args.train_batch_size * self.accelerator.num_processes, seed)
        return self.length_sampler

    def _get_eval_sampler(self, eval_dataset: Dataset):
        return None  # in order: the parent cannot group by length, since it does not know how long an example is


def hidden_at(hidden_BTH: torch.Tensor, pairs_M2: torch.Tensor) -> torch.Tensor:
    """Hidden states [M, H] at (row, column) pairs [M, 2]."""
    return hidden_BTH[pairs_M2[:, 0], pairs_M2[:, 1]]


def _means(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return sums / counts.to(sums.device).clamp(min=1e-9)


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether a weight, or this process's shard of it, is finite."""
    local = weight.to_local() if hasattr(weight, "to_local") else getattr(weight, "ds_tensor", weight)  # FSDP2, ZeRO-3
    return bool(local.detach().isfinite().all())


class _ProgressCallback(TrainerCallback):
    """Sets the epoch of dataset and sampler, which data loaders of several processes or of a resumed run do not, and stops
    the meter when a step ends."""

    def __init__(self, trainer: TokenMeanTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        for part in (self.trainer.train_dataset, self.trainer.length_sampler):
            if hasattr(part, "epoch"):
                part.epoch = epoch

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and torch.accelerator.is_available():
            torch.accelerator.synchronize()  # logging synchronizes anyway
        self.trainer.meter.stop()
