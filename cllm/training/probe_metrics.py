"""What a probe measures of a model in training, and the rules that tell good text from collapse.

Every rule compares the model with the target, which is the model before training, on the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

# Good text: at most this far from the target.
NLL_MARGIN = 0.2  # nats per token
REPETITION_MARGIN = 0.05  # share of tokens
ACCURACY_MARGIN = 0.01  # or one standard error, whichever is more
# Collapse: at least this far from the target.
NLL_COLLAPSE = 0.7  # nats per token
REPETITION_COLLAPSE = 0.25  # share of tokens
ENTROPY_COLLAPSE = 1 / 3  # of the target's entropy
EXTREME = 2.0  # a sign this strong needs no second probe to confirm it


Rule = Callable[["ProbeMetrics", "ProbeMetrics"], bool]  # (model's metrics, target's metrics) -> is the model's text good?


@dataclass(frozen=True)
class ProbeMetrics:
    """Metrics of a model's greedy Jacobi responses to a few held-out prompts."""

    prompts: int
    tpf: float  # tokens per forward
    nll: float  # mean negative log-likelihood of the responses under the target, in nats per token
    repetition: float  # share of tokens inside a repeated 4-gram, 0 .. 1
    entropy: float  # mean entropy of the model's own next-token distribution along the responses, in nats
    accuracy: float | None = None  # the task's metric, 0 .. 1; None where nothing could be scored

    @property
    def finite(self) -> bool:
        """Whether all metrics are finite numbers."""
        return all(math.isfinite(value) for value in astuple(self) if value is not None)


def collapse_signs(now: ProbeMetrics, target: ProbeMetrics) -> dict[str, float]:
    """The signs of collapse in words, each with its strength, at least 1.

    Low entropy counts only together with repetition: training on hard targets lowers it while the text stays good.
    """
    if not now.finite:
        return {"metrics that are not finite": math.inf}
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


def is_good(now: ProbeMetrics, target: ProbeMetrics) -> bool:
    """Whether the text is within the margins of the target's.

    Where the target answers some prompts right and others wrong, accuracy decides: it may fall by one standard error of the
    target's, or by ACCURACY_MARGIN if that is more. Otherwise NLL and repetition decide.
    """
    if collapse_signs(now, target):
        return False
    if now.accuracy is not None and target.accuracy is not None and 0 < target.accuracy < 1:
        error = math.sqrt(target.accuracy * (1 - target.accuracy) / target.prompts)
        return now.accuracy >= target.accuracy - max(error, ACCURACY_MARGIN)
    return now.nll <= target.nll + NLL_MARGIN and now.repetition <= target.repetition + REPETITION_MARGIN


def always_good(now: ProbeMetrics, target: ProbeMetrics) -> bool:
    """The rule for lossless training: the text is the target's, so every probe counts as good."""
    return True
