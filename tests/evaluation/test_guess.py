"""``--guess``: what was named, what was stored, or what is measured to be fastest."""

from typing import Any

import pytest
from tiny import EOS_ID, tiny_model, tiny_tokenizer

from cllm.decoding import GREEDY, Sampling
from cllm.errors import UsageError
from cllm.evaluation import guess as chosen
from cllm.evaluation.choice import Choice
from cllm.open_model import OpenModel
from cllm.prompts import PromptTemplate

PROMPTS = [[5, 6, 7], [8] * 9]


def opened(**record: Any) -> OpenModel:
    return OpenModel(tiny_model(), tiny_tokenizer(), record, PromptTemplate("{question}"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What is asked of the measurement, which takes pool to be the best."""
    asked: list[tuple] = []

    def measure(model, prompts, widths, guesses, batch_sizes, *, max_new_tokens, eos_ids, sampling) -> list[Choice]:
        asked.append((prompts, widths, batch_sizes, eos_ids, sampling))
        return [Choice(widths[0], 0, g, batch_sizes[0], 0.1, 1.0, 20.0 + (g == "pool"), 4) for g in guesses]

    monkeypatch.setattr(chosen, "measure_choices", measure)
    return asked


def test_named_stored_default(measured: list) -> None:
    of = opened(decoding_guess="prompt_lookup+pool")
    assert chosen.pick_guess("filler", of, 4, PROMPTS) == "filler"
    assert chosen.pick_guess(None, of, 4, PROMPTS) == "prompt_lookup+pool"
    assert chosen.pick_guess(None, opened(), 4, PROMPTS) == "context"
    assert not measured


def test_auto_takes_the_fastest_and_says_so(measured: list, caplog: pytest.LogCaptureFixture) -> None:
    sampling = Sampling(0.7)
    with caplog.at_level("INFO"):
        assert chosen.pick_guess("auto", opened(), 4, [[1] * 250, *PROMPTS], batch_size=2, sampling=sampling) == "pool"
    assert measured == [(PROMPTS, [4], [2], [EOS_ID], sampling)]  # without the prompt that leaves no room
    assert "--guess auto: pool, by tokens/s on 2 prompts (context 20.0, " in caplog.text


def test_nothing_to_measure(measured: list, caplog: pytest.LogCaptureFixture) -> None:
    of = opened(decoding_guess="pool")
    for width, prompts in ((1, PROMPTS), (4, []), (4, [[1] * 250])):
        with caplog.at_level("INFO"):
            assert chosen.pick_guess("auto", of, width, prompts) == "pool"
    assert not measured and "no prompt leaves room to measure with; pool is taken" in caplog.text


def test_measured_in_earnest() -> None:
    assert chosen.pick_guess("auto", opened(), 4, PROMPTS, sampling=GREEDY) in chosen.CANDIDATES


def test_unknown_names() -> None:
    for known in (None, "auto", "pool+filler"):
        chosen.check_guess(known)
    with pytest.raises(UsageError, match="unknown guess 'lucky'"):
        chosen.check_guess("lucky")
