"""The options of a training run: all of ``transformers.TrainingArguments``, and those of the objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from transformers import SchedulerType, TrainingArguments

from cllm.errors import UsageError, check_minimums
from cllm.training.examples import Consistency, Sampling, StateChoice
from cllm.training.objective import DIVERGENCES

CHOICES = {
    "consistency": ("global", "local"),
    "teacher": ("target", "self"),
    "ar_loss": ("target", "fixed_point", "labels"),
    "divergence": tuple(DIVERGENCES),
    "state_choice": ("uniform", "noise"),
}
OBJECTIVE = (  # what a checkpoint's record says of how it was trained
    "consistency",
    "divergence",
    "states_per_block",
    "state_choice",
    "random_block_size",
    "teacher",
    "ar_loss",
    "ar_weight",
    "distance_decay",
    "label_smoothing_factor",
)
NO_CHECKPOINTING = (  # why
    "it forwards blocks a second time without the cache that lossless training keeps the clean text in; leave it out, "
    "activations are kept of the blocks alone"
)
LOSSLESS_OBJECTIVE = ("divergence", "states_per_block", "distance_decay", "on_policy")


@dataclass
class ConsistencyArguments(TrainingArguments):
    """Of the consistency term, which every objective has."""

    states_per_block: int = field(
        default=1, metadata={"help": "states drawn from each trajectory per epoch; they share the cost of the clean text"}
    )
    distance_decay: float = field(default=0.5, metadata={"help": "a token d places after the first wrong guess weighs distance_decay**d"})
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "of the consistency term: forward_kl (the paper), reverse_kl, hard (cross-entropy on the teacher's "
            "likeliest token) or total_variation"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name, allowed[0]) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.distance_decay <= 1:
            raise UsageError(f"distance_decay must be above 0 and at most 1, got {self.distance_decay}")
        check_minimums(self, {"states_per_block": 1})
        self.remove_unused_columns = False


@dataclass
class CllmTrainingArguments(ConsistencyArguments):
    """Defaults are faster and keep the text better than the paper's objective at equal training tokens (docs/training.md)."""

    consistency: str = field(
        default="global",
        metadata={"help": "global: towards the fixed point; local: towards the next state (paper, section 3.2)"},
    )
    teacher: str = field(
        default="target",
        metadata={"help": "whose distribution the states learn: the frozen target model's, or self (the paper)"},
    )
    ar_loss: str = field(
        default="target",
        metadata={
            "help": "what keeps the model's own text good: target (KL to the frozen target model), fixed_point (cross-entropy "
            "on its responses, the paper) or labels (cross-entropy on the dataset's answers)"
        },
    )
    use_gt_labels: bool = field(default=False, metadata={"help": "the paper's name for --ar_loss labels"})
    ar_weight: float = field(default=12.0, metadata={"help": "weight of the AR term"})
    state_choice: str = field(
        default="uniform",
        metadata={
            "help": "which states are drawn: uniform (the paper) or noise: the share of wrong guesses rises from block to "
            "block and begins anew, from a random start in every response"
        },
    )
    random_block_size: bool = field(
        default=False, metadata={"help": "cut the blocks of each response to a width drawn from 1 .. block size"}
    )
    max_row_tokens: int = field(
        default=0,
        metadata={"help": "lay the examples of a batch into rows of at most so many tokens; 0: each into a row of its own"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_gt_labels:
            if self.ar_loss == "fixed_point":
                raise UsageError("use_gt_labels means ar_loss labels, got ar_loss fixed_point")
            self.ar_loss = "labels"
        check_minimums(self, {"max_row_tokens": 0, "ar_weight": 0})
        if not 0 <= self.label_smoothing_factor < 1:
            raise UsageError(f"label_smoothing_factor must be at least 0 and below 1, got {self.label_smoothing_factor}")
        if self.label_smoothing_factor and self.ar_loss == "target":
            raise UsageError("label_smoothing_factor needs labels: ar_loss must be fixed_point or labels, got target")

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            cast(Consistency, self.consistency),
            self.states_per_block,
            self.ar_loss == "labels",
            cast(StateChoice, self.state_choice),
            self.random_block_size,
        )

    @property
    def needs_target(self) -> bool:
        return "target" in (self.teacher, self.ar_loss)


def _default(name: str, value: Any) -> Any:
    """Another default for a field of a dataclass above."""
    return field(default=value, metadata=ConsistencyArguments.__dataclass_fields__[name].metadata)


@dataclass
class LosslessTrainingArguments(ConsistencyArguments):
    """Of the training of a consistency adapter (``cllm train --lossless``)."""

    states_per_block: int = _default("states_per_block", 2)
    distance_decay: float = _default("distance_decay", 0.8)
    on_policy: float = field(
        default=0.5, metadata={"help": "share of the steps whose states the adapter itself first takes one iteration further"}
    )
    learning_rate: float = _default("learning_rate", 2e-3)
    adam_beta2: float = _default("adam_beta2", 0.95)
    lr_scheduler_type: SchedulerType | str = _default("lr_scheduler_type", "cosine")
    warmup_steps: float = _default("warmup_steps", 0.05)
    train_sampling_strategy: str = _default("train_sampling_strategy", "group_by_length")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.on_policy <= 1:
            raise UsageError(f"on_policy must be a share of 0 .. 1, got {self.on_policy}")
        if self.label_smoothing_factor:
            raise UsageError("label_smoothing_factor needs labels, and lossless training has none; leave it out")
        if self.gradient_checkpointing:
            raise UsageError(f"gradient_checkpointing is on: {NO_CHECKPOINTING}")
