"""With every guess, as rows join and leave, the text is Hugging Face's greedy text. Runs a few of exactness.py's cases."""

import pytest
from cases import GUESSES, draw_case
from tiny import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_queue_with_every_guess(kind: str) -> None:
    for number, guess in enumerate(GUESSES):
        case = draw_case(number, kind=kind, guess=guess, queued=True, rows=2)
        assert case.decode() == case.expected(), case


def test_all_guesses_are_covered() -> None:
    assert len(GUESSES) == len(set(GUESSES)) == 19
    assert {"context", "uniform", "filler", "pool", "pool+prompt_lookup", "prompt_lookup+pool+filler"} < set(GUESSES)


def test_case_name_determines_case() -> None:
    assert draw_case("a") == draw_case("a") != draw_case("b")
