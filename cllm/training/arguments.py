"""The options of a training run: all of ``transformers.TrainingArguments``, and those of the objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from transformers import TrainingArguments

from cllm.errors import UsageError
from cllm.training.examples import Consistency, Sampling

CHOICES = {
    "consistency": ("global", "local"),
    "teacher": ("target", "self"),
    "ar_loss": ("target", "fixed_point", "labels"),
}


@dataclass
class CllmTrainingArguments(TrainingArguments):
    """Defaults are those of the recipe that kept the text good in trials (README, "Training")."""

    consistency: str = field(
        default="global",
        metadata={"help": "global: towards the fixed point; local: towards the next state (paper, section 3.2)"},
    )
    states_per_block: int = field(
        default=2, metadata={"help": "states drawn from each trajectory per epoch; they share the cost of the clean text"}
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
    ar_weight: float = field(default=2.0, metadata={"help": "weight of the AR term"})
    distance_decay: float = field(
        default=0.8, metadata={"help": "a token d places behind the first wrong guess weighs distance_decay**d"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_gt_labels:
            self.ar_loss = "labels"
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.distance_decay <= 1:
            raise UsageError(f"distance_decay must be above 0 and at most 1, got {self.distance_decay}")
        if self.states_per_block < 1:
            raise UsageError(f"states_per_block must be >= 1, got {self.states_per_block}")
        if self.ar_weight < 0:
            raise UsageError(f"ar_weight must be >= 0, got {self.ar_weight}")
        self.remove_unused_columns = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(cast(Consistency, self.consistency), self.states_per_block, self.ar_loss == "labels")

    @property
    def needs_target(self) -> bool:
        return "target" in (self.teacher, self.ar_loss)
