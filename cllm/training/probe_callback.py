"""Probes during training: warn of collapse or stop there, and keep the best model.

The best model has the highest TPF among those that a rule of :mod:`cllm.training.probe_metrics` calls good.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainerCallback

from cllm.errors import UsageError
from cllm.files import numbered_folders, write_json
from cllm.training.base import TokenMeanTrainer
from cllm.training.probe_metrics import EXTREME, ProbeMetrics, Rule, collapse_signs

EARLY = (0.1, 0.2, 0.4, 0.8)  # early probes, as shares of the first interval: too high a learning rate shows there
BEST, PART, OLD = "best", ".best", ".old-best"  # folder prefixes before -STEP: the best model, one being written, one being removed
METRICS_FILE = "probe.json"  # beside the weights of the best model
SIGNS = "probe_signs_of_collapse"  # log entry: the number of signs

logger = logging.getLogger(__name__)
Measure = Callable[[PreTrainedModel], ProbeMetrics]


@dataclass(frozen=True)
class BestModel:
    """The best model so far: the weights after ``step``, in the folder ``best-STEP``."""

    step: int
    metrics: ProbeMetrics


class ProbeCallback(TrainerCallback):
    """Probes the model in training, logs metrics as ``probe_...``, and keeps the best weights in ``best-STEP``.

    ``measure`` computes the metrics of a model. ``every`` is the interval in steps, or below 1 a share of the planned steps;
    there are a few earlier probes (EARLY) and one at the end. ``good`` says which probes the best may come from. Collapse is
    one extreme sign, or any sign at two probes in a row: it logs a warning and, with ``stop``, ends training. Probing leaves
    training unchanged: the weights equal those of a run without it, bit for bit.

    At the end the trainer's model gets the best weights; without a good probe it keeps the last ones, with a warning. A
    resumed run takes over the best model in the folder. One process measures while the others wait.

    Raises UsageError under FSDP and DeepSpeed, where no process holds all weights, and at the end if training collapsed
    before any good probe, so that there is nothing worth saving.
    """

    def __init__(self, trainer: TokenMeanTrainer, measure: Measure, target: PreTrainedModel, every: float, good: Rule, stop: bool) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UsageError("probing during training needs unsharded weights; leave out --probe_prompts under FSDP and DeepSpeed")
        self.trainer, self.measure, self.target_model, self.every, self.stop = trainer, measure, target, every, stop
        self.good = good
        self.folder = Path(str(trainer.args.output_dir))
        self.best: BestModel | None = None
        self.had_signs = self.collapsed = False  # whether the last probe showed signs, and whether that was collapse

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = check_steps(state.max_steps, self.every)
        self.target, self.best = self._shared(lambda: (self._metrics(self.target_model), self._stored_best(state.global_step)))
        earlier = [entry[SIGNS] for entry in state.log_history if SIGNS in entry]
        self.had_signs = bool(earlier and earlier[-1])
        if state.global_step == 0:
            self._log(_numbers(self.target, "probe_target_"), control)

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step not in self.steps:
            return
        metrics = self._shared(lambda: self._metrics(model))
        signs = collapse_signs(metrics, self.target)
        self.collapsed = max(signs.values(), default=0) >= EXTREME or (bool(signs) and self.had_signs)
        self.had_signs = bool(signs)
        self._log({**_numbers(metrics, "probe_"), SIGNS: len(signs)}, control)
        if self.good(metrics, self.target) and (self.best is None or metrics.tpf > self.best.metrics.tpf):
            self._keep(BestModel(state.global_step, metrics))
        if signs:
            self._warn(f"step {state.global_step}: {self._verdict()}: {'; '.join(signs)}")
        if self.collapsed and self.stop:
            control.should_training_stop = True
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.collapsed and self.stop:
            control.should_save = False  # a run must not resume from here

    def on_train_end(self, args, state, control, **kwargs):
        if self.best is not None:
            self._load(self.best, state)
        elif self.collapsed and self.stop:
            raise UsageError(
                f"training collapsed by step {state.global_step} before any good probe, so nothing was saved. "
                "Lower --learning_rate or raise --warmup_steps"
            )
        else:
            self._warn("no probe was within the margin of the target's quality: keeping the weights of the last step")

    # ------------------------------------------------------------- internals

    def _warn(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            logger.warning(text)

    def _verdict(self) -> str:
        if not self.collapsed:
            return "signs of collapse"
        return "collapse, training stops" if self.stop else "collapse"

    def _shared(self, make: Callable[[], Any]) -> Any:
        """Call ``make`` in the first process only; returns its result in all processes."""
        result = [make() if self.trainer.is_world_process_zero() else None]
        return broadcast_object_list(result)[0]

    def _metrics(self, model: Any) -> ProbeMetrics:
        with state_preserved(model), self.trainer.accelerator.autocast():
            return self.measure(model)

    def _log(self, values: dict[str, float], control) -> None:
        wanted = control.should_log  # logging clears the flag, which may be set for the loss of this step
        self.trainer.log(values)
        control.should_log = wanted

    def _stored_best(self, step: int) -> BestModel | None:
        """The best model of an earlier part of this run; a run from the start removes what it finds."""
        for name in (PART, OLD):
            for folder in numbered_folders(self.folder, name).values():
                shutil.rmtree(folder)
        best = None
        for at, folder in numbered_folders(self.folder, BEST).items():
            if step == 0:
                shutil.rmtree(folder)
            else:
                best = BestModel(at, ProbeMetrics(**json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))))
        return best

    def _keep(self, best: BestModel) -> None:
        """Save the weights. A complete ``best-STEP`` exists at every moment."""
        complete, part = (self.folder / f"{name}-{best.step}" for name in (BEST, PART))
        self.trainer.save_model(str(part), _internal_call=True)
        if self.trainer.is_world_process_zero():
            write_json(part / METRICS_FILE, asdict(best.metrics))
            if complete.exists():  # left by an interrupted run that had come further
                self._remove(best.step)
            part.rename(complete)
            for step in numbered_folders(self.folder, BEST):
                if step != best.step:
                    self._remove(step)
        self.trainer.accelerator.wait_for_everyone()
        self.best = best

    def _remove(self, step: int) -> None:
        """Remove ``best-STEP``. It is renamed first, and :meth:`_stored_best` removes the remains if a kill interrupts this."""
        hidden = self.folder / f"{OLD}-{step}"
        (self.folder / f"{BEST}-{step}").rename(hidden)
        shutil.rmtree(hidden)

    def _load(self, best: BestModel, state) -> None:
        """Load the best weights into the trainer's model as ``Trainer`` itself does, and record them in its state."""
        before = state.best_model_checkpoint
        state.best_global_step, state.best_metric = best.step, best.metrics.tpf
        state.best_model_checkpoint = str(self.folder / f"{BEST}-{best.step}")
        self.trainer._load_best_model()
        self.trainer.discard_pending_terms()  # they belong to other weights, and may not be finite
        state.best_model_checkpoint = before


def check_steps(planned: int, every: float) -> set[int]:
    """The steps after which to probe, of ``planned`` ones."""
    interval = every * planned if every < 1 else every
    multiples = [*EARLY, *range(1, int(planned / interval) + 1)]
    steps = [math.ceil(multiple * interval - 1e-6) for multiple in multiples]  # in floating point, 5 * 5.6 exceeds 28
    return {step for step in [*steps, planned] if step <= planned}


@contextmanager
def state_preserved(model: torch.nn.Module) -> Iterator[None]:
    """Restore the mode of every module and the state of all random generators on exit; no gradients inside."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(list(devices)), torch.no_grad():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module, training in modes:
                module.training = training


def _numbers(metrics: ProbeMetrics, prefix: str) -> dict[str, float]:
    """The log entries of a probe."""
    values = asdict(metrics)
    del values["prompts"]
    return {prefix + name: value for name, value in values.items() if value is not None}
