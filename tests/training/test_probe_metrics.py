"""The rules for collapse and for good text."""

from dataclasses import replace

import pytest

from cllm.training.probe_metrics import EXTREME, ProbeMetrics, collapse_signs, is_good

TARGET = ProbeMetrics(prompts=16, tpf=1.1, nll=0.4, repetition=0.2, entropy=0.6, accuracy=0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nll": 1.2}, ["NLL"]),
        ({"repetition": 0.5}, ["repetition"]),
        ({"repetition": 0.3, "entropy": 0.1}, ["entropy"]),
        ({"entropy": 0.01}, []),  # more confident, but without repetition
        ({"nll": 2.0, "repetition": 0.9, "entropy": 0.1}, ["NLL", "repetition", "entropy"]),
        ({"nll": 0.3, "repetition": 0.1, "entropy": 3.0}, []),
    ],
)
def test_signs_of_collapse(change: dict[str, float], words: list[str]) -> None:
    now = replace(TARGET, **change)
    assert [text.split()[0] for text in collapse_signs(now, TARGET)] == words
    assert is_good(now, TARGET) == (not words)


def test_strength_of_signs() -> None:
    assert max(collapse_signs(replace(TARGET, nll=1.2), TARGET).values()) < EXTREME
    assert max(collapse_signs(replace(TARGET, nll=1.9), TARGET).values()) > EXTREME
    assert max(collapse_signs(replace(TARGET, repetition=0.3, entropy=1e-12), TARGET).values()) < EXTREME
    assert max(collapse_signs(replace(TARGET, entropy=float("nan")), TARGET).values()) > EXTREME


@pytest.mark.parametrize(("accuracy", "expected"), [(0.5, True), (0.4, True), (0.36, False), (0.9, True)])
def test_accuracy_decides_where_the_target_is_partly_right(accuracy: float, expected: bool) -> None:
    """The standard error over 16 prompts at one half is 12.5 points."""
    assert is_good(replace(TARGET, accuracy=accuracy, nll=0.9), TARGET) == expected


@pytest.mark.parametrize("accuracy", [None, 0.0, 1.0])
def test_likelihood_and_repetition_decide_otherwise(accuracy: float | None) -> None:
    target = replace(TARGET, accuracy=accuracy)
    assert is_good(replace(target, nll=0.55, repetition=0.24), target)
    assert not is_good(replace(target, nll=0.65), target)
    assert not is_good(replace(target, repetition=0.3), target)
