"""The rules: what is collapse, and what is good."""

from dataclasses import replace

import pytest

from cllm.training.figures import EXTREME, Figures, good, signs

TARGET = Figures(prompts=16, tpf=1.1, nll=0.4, repetition=0.2, entropy=0.6, accuracy=0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nll": 1.2}, ["NLL"]),
        ({"repetition": 0.5}, ["repetition"]),
        ({"repetition": 0.3, "entropy": 0.1}, ["entropy"]),
        ({"entropy": 0.01}, []),  # surer of a text that does not loop
        ({"nll": 2.0, "repetition": 0.9, "entropy": 0.1}, ["NLL", "repetition", "entropy"]),
        ({"nll": 0.3, "repetition": 0.1, "entropy": 3.0}, []),
    ],
)
def test_signs_of_collapse(change: dict[str, float], words: list[str]) -> None:
    now = replace(TARGET, **change)
    assert [text.split()[0] for text in signs(now, TARGET)] == words
    assert good(now, TARGET) == (not words)


def test_how_strong_a_sign_is() -> None:
    assert max(signs(replace(TARGET, nll=1.2), TARGET).values()) < EXTREME
    assert max(signs(replace(TARGET, nll=1.9), TARGET).values()) > EXTREME
    assert max(signs(replace(TARGET, repetition=0.3, entropy=1e-12), TARGET).values()) < EXTREME
    assert max(signs(replace(TARGET, entropy=float("nan")), TARGET).values()) > EXTREME


@pytest.mark.parametrize(("accuracy", "is_good"), [(0.5, True), (0.4, True), (0.36, False), (0.9, True)])
def test_accuracy_decides_where_it_says_something(accuracy: float, is_good: bool) -> None:
    """A standard error of 16 prompts at one half is 12.5 points."""
    assert good(replace(TARGET, accuracy=accuracy, nll=0.9), TARGET) == is_good


@pytest.mark.parametrize("accuracy", [None, 0.0, 1.0])
def test_likelihood_and_repetition_decide_elsewhere(accuracy: float | None) -> None:
    target = replace(TARGET, accuracy=accuracy)
    assert good(replace(target, nll=0.55, repetition=0.24), target)
    assert not good(replace(target, nll=0.65), target)
    assert not good(replace(target, repetition=0.3), target)
