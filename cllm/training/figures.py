"""What a check of a model in training tells of it, and the rules on that: what is good, and what is collapse.

The model before training, the target, is measured on the same prompts; every rule compares with its figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

NLL_MARGIN = 0.2  # nats per token that a good model may lie above the target ...
REPETITION_MARGIN = 0.05  # ... and share of tokens
ACCURACY_MARGIN = 0.01  # at least; a standard error where that is more
NLL_COLLAPSE = 0.7  # nats per token above the target
REPETITION_COLLAPSE = 0.25  # share of tokens above the target
ENTROPY_COLLAPSE = 1 / 3  # of the target's
EXTREME = 2.0  # times as much needs no second check


Rule = Callable[["Figures", "Figures"], bool]  # is a check good: its figures, the target's


@dataclass(frozen=True)
class Figures:
    """A model's greedy Jacobi text on a few held-out prompts."""

    prompts: int
    tpf: float  # tokens per forward
    nll: float  # of its responses under the target, in nats per token
    repetition: float  # share of tokens inside a repeated 4-gram, 0 .. 1
    entropy: float  # of its own next-token distribution along its responses, in nats
    accuracy: float | None = None  # the task's metric, 0 .. 1; None where nothing could be scored

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in astuple(self) if value is not None)


def signs(now: Figures, target: Figures) -> dict[str, float]:
    """The signs of collapse, in words, with their strength: 1 is where collapse begins.

    A low entropy counts only beside repetition: training on hard targets lowers it, and the text stays good.
    """
    if not now.finite:
        return {"figures that are no numbers": math.inf}
    found = {
        f"NLL under the target {now.nll:.2f}, the target's own {target.nll:.2f}": (now.nll - target.nll) / NLL_COLLAPSE,
        f"repetition {now.repetition:.0%}, the target's {target.repetition:.0%}": (
            (now.repetition - target.repetition) / REPETITION_COLLAPSE
        ),
    }
    if now.repetition > target.repetition + REPETITION_MARGIN:
        fall = ENTROPY_COLLAPSE * target.entropy / max(now.entropy, 1e-9)
        found[f"entropy {now.entropy:.2f}, the target's {target.entropy:.2f}"] = min(fall, 1.0)
    return {text: strength for text, strength in found.items() if strength >= 1}


def good(now: Figures, target: Figures) -> bool:
    """Whether the text is within the margin of the target's: by accuracy where that says something, else by NLL and repetition.

    Accuracy may lie a standard error of the target's below it, or a point where that is more. It says something where the
    target answers some prompts right and others wrong.
    """
    if signs(now, target):
        return False
    if now.accuracy is not None and target.accuracy is not None and 0 < target.accuracy < 1:
        error = math.sqrt(target.accuracy * (1 - target.accuracy) / target.prompts)
        return now.accuracy >= target.accuracy - max(error, ACCURACY_MARGIN)
    return now.nll <= target.nll + NLL_MARGIN and now.repetition <= target.repetition + REPETITION_MARGIN


def unchanged(now: Figures, target: Figures) -> bool:
    """For training that leaves the text as it is: every check is good, whatever near-ties do to its text."""
    return True
