"""The plain form of the paper's decoder writes what AR decoding writes."""

import pytest
from cases import generate
from tiny import tiny_model

from cllm import reference


@pytest.mark.parametrize("block", [1, 2, 7])
def test_cached_jacobi_decoding_is_ar_decoding(block: int) -> None:
    model, prompt = tiny_model(vocab_size=97, eos_token_id=None), [5, 9, 13, 5, 9]
    expected = generate(model, prompt, 30, [])
    stops = [expected[11]]
    for eos, text in (([], expected), (stops, expected[: expected.index(stops[0]) + 1])):
        found, forwards = reference.decode(model, prompt, block, 30, lambda prefix, size: list(prefix[:size]), eos)
        assert found == text
        assert forwards == len(text) if block == 1 else forwards <= len(text)


def test_right_guesses_are_accepted_a_block_at_a_time() -> None:
    model, prompt = tiny_model(vocab_size=97, eos_token_id=None), [5, 9, 13]
    text = prompt + generate(model, prompt, 31, [])
    found, forwards = reference.decode(model, prompt, 5, 31, lambda prefix, size: text[len(prefix) :][:size])
    assert found == text[3:] and forwards == 1 + 30 // 5
