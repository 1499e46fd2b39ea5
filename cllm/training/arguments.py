"""Options of a training run: those of ``transformers.TrainingArguments`` and those of the objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from transformers import SchedulerType, TrainingArguments

from cllm.errors import UsageError, check_minimums
from cllm.training.examples import Consistency, StateChoice, StateSampling
from cllm.training.objective import DIVERGENCES

ALLOWED = {
    "consistency": ("global", "local"),
    "teacher": ("target", "self"),
    "ar_loss": ("target", "fixed_point", "labels"),
    "divergence": tuple(DIVERGENCES),
    "state_choice": ("uniform", "noise"),
}
OBJECTIVE_FIELDS = (  # recorded in the checkpoint
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
NO_CHECKPOINTING = (  # the reason in error messages
    "it would forward blocks a second time without the cached clean text; leave it out, since only the blocks' activations "
    "are stored anyway"
)
LOSSLESS_OBJECTIVE = ("states_per_block", "distance_decay")


@dataclass
class ConsistencyArguments(TrainingArguments):
    """Options of the consistency term, which every objective has. Raises UsageError for a value that is not allowed."""

    states_per_block: int = field(
        default=1, metadata={"help": "states drawn from each trajectory per epoch; they share the cost of the clean text"}
    )
    distance_decay: float = field(default=0.5, metadata={"help": "a token d places after the first wrong guess weighs distance_decay**d"})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name, allowed in ALLOWED.items():
            if getattr(self, name, allowed[0]) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.distance_decay <= 1:
            raise UsageError(f"distance_decay must be above 0 and at most 1, got {self.distance_decay}")
        check_minimums(self, {"states_per_block": 1})
        self.remove_unused_columns = False


@dataclass
class CllmTrainingArguments(ConsistencyArguments):
    """Options of training all weights or LoRA.

    At equal training tokens the defaults give a faster model than the paper's objective and change its text less
    (docs/benchmarks/training.md). Raises UsageError for a value that is not allowed.
    """

    consistency: str = field(
        default="global",
        metadata={"help": "what a state learns to predict: global, the fixed point; local, the next state (paper, section 3.2)"},
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "divergence of the consistency term: forward_kl (the paper), reverse_kl, or hard (cross-entropy on the "
            "teacher's likeliest token)"
        },
    )
    teacher: str = field(
        default="target",
        metadata={"help": "whose distribution the states learn: target (the frozen target model) or self (the paper)"},
    )
    ar_loss: str = field(
        default="target",
        metadata={
            "help": "what preserves the model's text: target (KL to the frozen target model), fixed_point (cross-entropy on "
            "its responses, the paper) or labels (cross-entropy on the dataset's answers)"
        },
    )
    use_gt_labels: bool = field(default=False, metadata={"help": "the paper's name for --ar_loss labels"})
    ar_weight: float = field(default=12.0, metadata={"help": "weight of the AR term"})
    state_choice: str = field(
        default="uniform",
        metadata={
            "help": "which states are drawn: uniform (the paper), or noise: the share of wrong guesses rises from block to "
            "block, cyclically, from a random phase per response"
        },
    )
    random_block_size: bool = field(
        default=False, metadata={"help": "truncate the blocks of each response to a width drawn from 1 .. block size"}
    )
    max_row_tokens: int = field(
        default=0,
        metadata={"help": "pack the examples of a batch into rows of at most this many tokens; 0: one example per row"},
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
    def state_sampling(self) -> StateSampling:
        """How states are drawn from trajectories."""
        return StateSampling(
            cast(Consistency, self.consistency),
            self.states_per_block,
            self.ar_loss == "labels",
            cast(StateChoice, self.state_choice),
            self.random_block_size,
        )

    @property
    def needs_target(self) -> bool:
        """Whether the objective reads the frozen target model."""
        return "target" in (self.teacher, self.ar_loss)


def _with_default(name: str, value: Any) -> Any:
    """An inherited field with another default."""
    return field(default=value, metadata=ConsistencyArguments.__dataclass_fields__[name].metadata)


@dataclass
class LosslessTrainingArguments(ConsistencyArguments):
    """Options of training a consistency adapter (``cllm train --lossless``).

    docs/training.md compares the defaults with other values. Raises UsageError for a value that is not allowed.
    """

    states_per_block: int = field(
        default=1, metadata={"help": "how often a response is cut into blocks per epoch; the cuts share the cost of the clean text"}
    )
    distance_decay: float = _with_default("distance_decay", 0.8)
    per_device_train_batch_size: int = _with_default("per_device_train_batch_size", 2)
    learning_rate: float = _with_default("learning_rate", 2e-3)
    adam_beta2: float = _with_default("adam_beta2", 0.95)
    lr_scheduler_type: SchedulerType | str = _with_default("lr_scheduler_type", "cosine")
    warmup_steps: float = _with_default("warmup_steps", 0.05)
    train_sampling_strategy: str = _with_default("train_sampling_strategy", "group_by_length")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing_factor:
            raise UsageError("label_smoothing_factor needs labels, and lossless training has none; leave it out")
        if self.gradient_checkpointing:
            raise UsageError(f"gradient_checkpointing is on: {NO_CHECKPOINTING}")
