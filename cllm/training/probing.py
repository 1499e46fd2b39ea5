"""Checks of a model in training: their options, and the callbacks that make them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from cllm.errors import UsageError, check_minimums
from cllm.evaluation.probe import DraftProbe, Probe
from cllm.evaluation.prompt import encode
from cllm.models import context_length, default_guess, read_record, stop_token_ids
from cllm.prompts import choose_template
from cllm.tasks.configure import configured_task
from cllm.tasks.source import load_examples
from cllm.training.probe_callback import ProbeCallback
from cllm.training.probe_metrics import always_good, is_good

ON_COLLAPSE = ("warn", "stop")


@dataclass
class ProbeArguments:
    """Checks of the model in training, on held-out prompts. Raises UsageError for a value that is out of range."""

    probe_prompts: int = field(
        default=0,
        metadata={"help": "measure speed and quality on so many held-out prompts now and then, keep the best model; 0: never"},
    )
    probe_file: str | None = field(
        default=None, metadata={"help": "where they are, plain or .gz; default: the test rows of the task's hub dataset"}
    )
    probe_task: str | None = field(default=None, metadata={"help": "whose prompts; default: the task of the trajectories"})
    probe_length: int = field(default=64, metadata={"help": "new tokens per response at most"})
    probe_every: float = field(
        default=0.1, metadata={"help": "steps between two checks, below 1 as a share of all; the first ones come earlier"}
    )

    def __post_init__(self) -> None:
        check_minimums(self, {"probe_prompts": 0, "probe_length": 1})
        if not 0 < self.probe_every < math.inf:
            raise UsageError(f"probe_every must be a number above 0, got {self.probe_every}")
        if not self.probe_prompts and any(getattr(self, option.name) != option.default for option in fields(self)):
            raise UsageError("nothing is checked during training without --probe_prompts, the number of prompts to take")


@dataclass
class CollapseArguments(ProbeArguments):
    """Checks of a training that can harm the text."""

    on_collapse: str = field(
        default="warn",
        metadata={"help": "warn; or stop, when the text shows signs of collapse at two checks in a row, or an extreme one"},
    )

    def __post_init__(self) -> None:
        if self.on_collapse not in ON_COLLAPSE:
            raise UsageError(f"on_collapse must be one of {', '.join(ON_COLLAPSE)}, got {self.on_collapse!r}")
        super().__post_init__()


def watch(trainer: Any, probe: ProbeArguments, target: Any) -> None:
    """Let a trainer check its model as ``probe`` says. ``target``: the model before training.

    Raises UsageError where there is no task, no prompt that fits, or a file that cannot be read.
    """
    stop = isinstance(probe, CollapseArguments) and probe.on_collapse == "stop"
    trainer.add_callback(ProbeCallback(trainer, _probe(trainer, probe, target), target, probe.probe_every, is_good, stop))


def watch_drafts(trainer: Any, probe: ProbeArguments) -> None:
    """As :func:`watch`, for the trainer of a consistency adapter, which changes the speed alone."""
    base = trainer.model.get_base_model()
    measure = DraftProbe(_probe(trainer, probe, base), trainer.model)
    trainer.add_callback(ProbeCallback(trainer, measure, base, probe.probe_every, always_good, stop=False))


def _probe(trainer: Any, probe: ProbeArguments, target: Any) -> Probe:
    record = read_record(trainer.model.config)
    name = probe.probe_task or record.get("task")
    if name is None:
        raise UsageError("the trajectories do not say their task; pass --probe_task")
    task, tokenizer = configured_task(name, "speedup", filename=probe.probe_file), trainer.processing_class
    template = choose_template(None, task.plain_template, tokenizer, record)
    examples = list(load_examples(task, probe.probe_file, "test", probe.probe_prompts))
    context = context_length(target.config)
    prompts, too_long = encode(examples, template, tokenizer, context and context - probe.probe_length)
    if not prompts:
        raise UsageError(f"none of the {len(too_long)} prompts leaves room for --probe_length {probe.probe_length}")
    return Probe(
        task,
        prompts,
        tokenizer,
        target,
        record["block_size"],
        default_guess(record),
        probe.probe_length,
        stop_token_ids(target, tokenizer, template),
    )
