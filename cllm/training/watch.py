"""Checks during training: warn of collapse, or stop there, and keep the best model.

The best is the one of highest TPF among the checks that are good by a rule of :mod:`cllm.training.figures`.
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
from cllm.training.figures import EXTREME, Figures, Rule, signs

EARLY = (0.1, 0.2, 0.4, 0.8)  # of the way to the first regular check: a rate that is too high shows there
BEST, PART, OLD = "best", ".best", ".old-best"  # folders, each followed by its step: the best model, while it is written or removed
FIGURES = "probe.json"  # beside the weights of the best model
SIGNS = "probe_signs_of_collapse"  # how many, in the log

logger = logging.getLogger(__name__)
Measure = Callable[[PreTrainedModel], Figures]


@dataclass(frozen=True)
class Kept:
    """The best model so far: the weights after ``step`` in the folder ``best-STEP``."""

    step: int
    figures: Figures


class Watch(TrainerCallback):
    """Measures the model in training, logs the figures as ``probe_...``, and keeps the best weights in ``best-STEP``.

    ``every``: a check each so many steps, below 1 as a share of the planned ones; the first ones come earlier (EARLY), the
    last at the end. ``good``: which of them the best is chosen from. Collapse is one extreme sign, or any at two checks in a
    row. It is logged as a warning; with ``stop`` training ends. Training itself is not disturbed: the weights are those of a
    run without checks, bit for bit.

    At the end the trainer's model has the best weights; without a good check it stays as it is, with a warning. A resumed
    run goes on with the best that lies in the folder. One process measures, the others wait.

    Raises UsageError where no process holds the whole weights, and, at the end, where training collapsed before any good
    check: then there is nothing worth saving.
    """

    def __init__(self, trainer: TokenMeanTrainer, measure: Measure, target: PreTrainedModel, every: float, good: Rule, stop: bool) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UsageError("checks during training need whole weights; leave out --probe_prompts under FSDP and DeepSpeed")
        self.trainer, self.measure, self.target_model, self.every, self.stop = trainer, measure, target, every, stop
        self.good = good
        self.folder = Path(str(trainer.args.output_dir))
        self.best: Kept | None = None
        self.weak = self.collapsed = False  # were there signs at the last check; was it collapse

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = due(state.max_steps, self.every)
        self.target, self.best = self._shared(lambda: (self._figures(self.target_model), self._found(state.global_step)))
        earlier = [entry[SIGNS] for entry in state.log_history if SIGNS in entry]
        self.weak = bool(earlier and earlier[-1])
        if state.global_step == 0:
            self._log(_numbers(self.target, "probe_target_"), control)

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step not in self.steps:
            return
        figures = self._shared(lambda: self._figures(model))
        found = signs(figures, self.target)
        self.collapsed = max(found.values(), default=0) >= EXTREME or (bool(found) and self.weak)
        self.weak = bool(found)
        self._log({**_numbers(figures, "probe_"), SIGNS: len(found)}, control)
        if self.good(figures, self.target) and (self.best is None or figures.tpf > self.best.figures.tpf):
            self._keep(Kept(state.global_step, figures))
        if found:
            self._warn(f"step {state.global_step}: {self._verdict()}: {'; '.join(found)}")
        if self.collapsed and self.stop:
            control.should_training_stop = True
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.collapsed and self.stop:
            control.should_save = False  # a resumed run must not go on from here

    def on_train_end(self, args, state, control, **kwargs):
        if self.best is not None:
            self._load(self.best, state)
        elif self.collapsed and self.stop:
            raise UsageError(
                f"training collapsed by step {state.global_step}, and no check before was good: nothing saved. "
                "Lower --learning_rate, or let it start with --warmup_steps"
            )
        else:
            self._warn("no check was within the margin of the target's quality: the model is that of the last step")

    # ------------------------------------------------------------- internals

    def _warn(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            logger.warning(text)

    def _verdict(self) -> str:
        if not self.collapsed:
            return "signs of collapse"
        return "collapse, training stops" if self.stop else "collapse"

    def _shared(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, in all of them."""
        made = [make() if self.trainer.is_world_process_zero() else None]
        return broadcast_object_list(made)[0]

    def _figures(self, model: Any) -> Figures:
        with undisturbed(model), self.trainer.accelerator.autocast():  # model and target alike
            return self.measure(model)

    def _log(self, figures: dict[str, float], control) -> None:
        wanted = control.should_log  # logging answers this wish, which may be for the loss of this very step
        self.trainer.log(figures)
        control.should_log = wanted

    def _found(self, step: int) -> Kept | None:
        """What an earlier part of this run kept; a run from the start removes what lies there."""
        for name in (PART, OLD):
            for folder in numbered_folders(self.folder, name).values():
                shutil.rmtree(folder)
        kept = None
        for at, folder in numbered_folders(self.folder, BEST).items():
            if step == 0:
                shutil.rmtree(folder)
            else:
                kept = Kept(at, Figures(**json.loads((folder / FIGURES).read_text(encoding="utf-8"))))
        return kept

    def _keep(self, best: Kept) -> None:
        """Save the weights; at every moment one whole ``best-STEP`` is there."""
        whole, part = (self.folder / f"{name}-{best.step}" for name in (BEST, PART))
        self.trainer.save_model(str(part), _internal_call=True)
        if self.trainer.is_world_process_zero():
            write_json(part / FIGURES, asdict(best.figures))
            if whole.exists():  # of a later part of an interrupted run
                self._remove(best.step)
            part.rename(whole)
            for step in numbered_folders(self.folder, BEST):
                if step != best.step:
                    self._remove(step)
        self.trainer.accelerator.wait_for_everyone()
        self.best = best

    def _remove(self, step: int) -> None:
        """Gone at once for whoever looks for ``best-STEP``, whatever a kill leaves of it (see :meth:`_found`)."""
        hidden = self.folder / f"{OLD}-{step}"
        (self.folder / f"{BEST}-{step}").rename(hidden)
        shutil.rmtree(hidden)

    def _load(self, best: Kept, state) -> None:
        """Give the trainer's model the best weights, by the parent's own way, and note them in its state."""
        before = state.best_model_checkpoint
        state.best_global_step, state.best_metric = best.step, best.figures.tpf
        state.best_model_checkpoint = str(self.folder / f"{BEST}-{best.step}")
        self.trainer._load_best_model()
        self.trainer.forget_parts()  # they are of other weights, and may be no numbers
        state.best_model_checkpoint = before


def due(planned: int, every: float) -> set[int]:
    """The steps that are checked."""
    interval = every * planned if every < 1 else every
    places = [*EARLY, *range(1, int(planned / interval) + 1)]
    steps = [math.ceil(place * interval - 1e-6) for place in places]  # 5 * 5.6 is a little more than 28 here
    return {step for step in [*steps, planned] if step <= planned}


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Whatever happens inside, the mode of every module and all random generators are as before."""
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


def _numbers(figures: Figures, prefix: str) -> dict[str, float]:
    """What goes into the log."""
    values = asdict(figures)
    del values["prompts"]
    return {prefix + name: value for name, value in values.items() if value is not None}
