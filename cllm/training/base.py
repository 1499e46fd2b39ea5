"""What both trainers add to ``transformers.Trainer``: losses that are means over the tokens of the global batch.

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

from cllm.errors import UsageError
from cllm.packing import packed_mask
from cllm.training.examples import batch_layout
from cllm.training.head import LanguageHead
from cllm.training.lora import adapted
from cllm.training.meter import Meter
from cllm.training.order import LengthGroupedOrder

Batch = dict[str, torch.Tensor]


class TokenMeanTrainer(Trainer):
    """Loss = weighted sum of terms, each a mean over the tokens of the global batch (all processes, all accumulated
    micro-batches), so that its split does not change the gradient.

    Logits are made from hidden states where a loss needs them, never for the whole batch. Everything else is the parent's;
    ``--train_sampling_strategy group_by_length`` gives an order that a resumed run repeats.
    """

    terms: tuple[str, ...]  # names in the log

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model: PreTrainedModel
        self.model_accepts_loss_kwargs = True  # the loss is divided by the global batch's token counts here
        self.order: LengthGroupedOrder | None = None
        self.add_callback(_ProgressCallback(self))
        self.meter = Meter()
        if self.args.use_liger_kernel and (self.args.device.type == "cpu" or not is_liger_kernel_available()):
            raise UsageError("use_liger_kernel needs a GPU and the package liger-kernel; leave it out")
        if self.args.dataloader_persistent_workers:
            raise UsageError("dataloader_persistent_workers would show every epoch the first one's examples; leave it out")
        self._verified = False
        self._parts: list[torch.Tensor] = []  # of every micro-batch since the last log
        self._steps = 0  # since then
        self._evaluated: list[torch.Tensor] = []  # sums and counts [2, L] of every batch of an evaluation

    # ------------------------------------------------------ for the subclass

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the terms."""
        return (1.0,) * len(self.terms)

    @abstractmethod
    def counts(self, batch: Batch) -> torch.Tensor:
        """How much a batch weighs in the mean of each term: [L]."""

    @abstractmethod
    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The terms of a batch as weighted sums over its tokens: [L]."""

    @abstractmethod
    def useful_tokens(self, batch: Batch) -> torch.Tensor:
        """How many tokens of a batch are not padding: []."""

    def last_hidden(self, model: torch.nn.Module, head: LanguageHead, cache: Cache | None = None, **inputs: Any) -> torch.Tensor:
        """Last hidden states [B, T, H], through the model's public forward, after what is in ``cache`` and into it."""
        inputs |= {"past_key_values": cache, "use_cache": cache is not None}
        asked: list[int] = [] if self._verified else [-1]  # places whose logits the model itself makes
        inputs["logits_to_keep"] = torch.tensor(asked, dtype=torch.long, device=inputs["input_ids"].device)
        output = model(**inputs, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        if not self._verified:
            head.verify(hidden[:, -1:], output.logits[:, -1:])
            self._verified = True
        return hidden

    def packed_hidden(self, model: torch.nn.Module, batch: Batch, head: LanguageHead) -> torch.Tensor:
        """Last hidden states [B, T, H] of a packed batch."""
        layout = batch_layout(batch)
        mask = packed_mask(head.config, layout, layout, head.layer.weight.dtype)
        return self.last_hidden(model, head, input_ids=batch["input_ids"], attention_mask=mask, position_ids=layout.position_BT)

    # ------------------------------------------------- what the parent calls

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
        """The loss of one micro-batch, as its share of the global batch's mean."""
        counts = num_items_in_batch if isinstance(num_items_in_batch, torch.Tensor) else self.counts(inputs)
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes  # gradients are averaged over them
        sums = self.loss_sums(model, inputs)
        parts = processes * _means(sums, counts)
        if model.training:
            self._parts.append(parts.detach())
            self.meter.count(inputs["input_ids"].numel(), self.useful_tokens(inputs))
        loss = self._weighted(parts)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation reports the same loss; :meth:`evaluation_loop` makes one mean of all batches."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.loss_sums(model, inputs)
        self._evaluated.append(torch.stack([sums, self.counts(inputs).to(sums)]))
        return self._weighted(_means(*self._evaluated[-1])), None, None

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        """The parent's, with the loss as means over the tokens of the whole set.

        Of several processes some see examples of its start again, which fill up the last batches.
        """
        self._evaluated.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        totals = self.accelerator.reduce(torch.stack(self._evaluated).sum(dim=0), reduction="sum")
        loss = {f"{metric_key_prefix}_loss": self._weighted(_means(*totals)).item()}
        return output._replace(metrics=(output.metrics or {}) | loss)

    def _weighted(self, parts: torch.Tensor) -> torch.Tensor:
        """The loss [] of its terms [L]."""
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """Around all of the loss: it also autocasts what runs outside the prepared model's forward (output layer, target).

        Adapters do not cast their input to float32 meanwhile; autocast would cast it back.
        """
        stack = ExitStack()
        stack.enter_context(self.accelerator.autocast())
        if self.accelerator.native_amp and adapted(self.model):
            from peft.helpers import disable_input_dtype_casting

            stack.enter_context(disable_input_dtype_casting(self.model))
        return stack

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the parent's log, of the steps since the last one: throughput, and the means of the terms if several."""
        if self._parts and "loss" in logs:
            mean = self._mean_parts()
            if len(self.terms) > 1:
                logs |= dict(zip(self.terms, mean))
            logs |= self.meter.read(self.accelerator.num_processes)
            self.forget_parts()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's, but nothing is saved of a run that has diverged, and the result of FSDP is whole, not in shards.

        An adapter gets the record beside it, which says how the model is asked and whether the adapter may be merged.
        """
        self._mean_parts()
        unfit = [name for name, weight in self.model.named_parameters() if not _finite(weight)]
        if unfit:
            raise self._diverged(f"the weights in {unfit[0]} are")
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and adapted(self.model):
            self.model.config.save_pretrained(str(output_dir or self.args.output_dir))

    def forget_parts(self) -> None:
        """Nothing of the steps up to here goes into the next log."""
        self._parts.clear()
        self._steps = 0

    def _mean_parts(self) -> list[float]:
        """The terms as means over the steps since the last log, alike on all processes. Raises UsageError where not finite."""
        if not self._parts:
            return []
        mean = self.accelerator.reduce(torch.stack(self._parts).sum(dim=0) / max(self._steps, 1), reduction="mean")
        if not mean.isfinite().all():
            raise self._diverged("the loss is")
        return mean.tolist()

    def _diverged(self, what: str) -> UsageError:
        return UsageError(
            f"{what} not a finite number any more at step {self.state.global_step}, and training has stopped; checkpoints "
            f"saved before in {self.args.output_dir} are kept. Lower --learning_rate ({self.args.learning_rate:g}) or "
            f"--max_grad_norm ({self.args.max_grad_norm:g}), or raise --warmup_steps"
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        self.order = LengthGroupedOrder(dataset, self.args.train_batch_size * self.accelerator.num_processes, seed)
        return self.order

    def _get_eval_sampler(self, eval_dataset: Dataset):
        return None  # as they come: to group them by length, the parent would have to know what an example is


def at(hidden_BTH: torch.Tensor, pairs_M2: torch.Tensor) -> torch.Tensor:
    """The hidden states [M, H] of tokens that are given by row and column."""
    return hidden_BTH[pairs_M2[:, 0], pairs_M2[:, 1]]


def _means(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return sums / counts.to(sums.device).clamp(min=1e-9)


def _finite(weight: torch.Tensor) -> bool:
    """Whether all of a weight, or of this process's shard of it, is finite."""
    own = weight.to_local() if hasattr(weight, "to_local") else getattr(weight, "ds_tensor", weight)  # FSDP2, ZeRO-3
    return bool(own.detach().isfinite().all())


class _ProgressCallback(TrainerCallback):
    """Tells dataset and order which epoch it is (data loaders of several processes, or of a resumed run, do not), and the
    meter when a step ends."""

    def __init__(self, trainer: TokenMeanTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        for part in (self.trainer.train_dataset, self.trainer.order):
            if hasattr(part, "epoch"):
                part.epoch = epoch

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and torch.accelerator.is_available():
            torch.accelerator.synchronize()  # as the log is about to do
        self.trainer.meter.stop()
