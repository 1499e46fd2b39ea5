"""Both methods write the same text, and the kinds of tokens add up to the engine's counts."""

import xml.etree.ElementTree as ET

import pytest
from tiny import EOS_ID, tiny_model, tiny_tokenizer

from cllm.decoding import JacobiDecoder
from cllm.serving.demo.picture import COLUMNS, LINES, animate, fragments
from cllm.serving.demo.race import ar_decoder, race


@pytest.fixture(scope="module")
def runs():
    """For several models: the steps of a race, and the engine's own result."""
    tokenizer, found = tiny_tokenizer(), []
    for seed in range(6):
        model = tiny_model(seed=seed, initializer_range=0.08 + 0.05 * seed)
        decoder = JacobiDecoder(model, 6, eos_token_ids=[EOS_ID])
        prompt = tokenizer(f"prompt {seed}").input_ids
        steps = list(race(ar_decoder(decoder), decoder, tokenizer, prompt, 60))
        found.append((steps, decoder.generate([prompt], max_new_tokens=60)[0]))
    return found


def steps_of(steps, method):
    return [step for step in steps if step.method == method]


def test_texts_are_equal(runs) -> None:
    for steps, result in runs:
        for method in ("ar", "jacobi"):
            own = steps_of(steps, method)
            assert [token.id for step in own for token in step.gained] == result.token_ids
            assert [step.ended for step in own] == [False] * (len(own) - 1) + [True]
            assert "".join(t.text for s in own for t in s.gained) == tiny_tokenizer().decode(result.token_ids, skip_special_tokens=True)
        assert len(steps_of(steps, "ar")) == len(result.token_ids) and len(steps_of(steps, "jacobi")) == result.forwards


def test_race_stores_no_prefix(runs) -> None:
    """Otherwise the next race with the same prompt would skip the prefill."""
    assert all(result.reused == 0 for _, result in runs)


def test_kinds_add_up_to_the_engines_counts(runs) -> None:
    for steps, result in runs:
        kinds = [token.kind for step in steps_of(steps, "jacobi") for token in step.gained]
        assert kinds.count("stationary") == result.stationary
        assert kinds.count("stationary") + kinds.count("fast") >= result.fast_forwarded
        assert {token.kind for step in steps_of(steps, "ar") for token in step.gained} == {"plain"}
    assert sum(result.stationary for _, result in runs) > 0


def test_method_with_less_time_goes_next(runs) -> None:
    for steps, _ in runs:
        clocks = {"ar": 0.0, "jacobi": 0.0}
        for step in steps[: len(steps) // 2]:
            assert clocks[step.method] == min(clocks.values())
            clocks[step.method] = step.seconds


def test_picture_is_valid_and_has_the_text(runs) -> None:
    for steps, _ in runs:
        picture = ET.fromstring(animate(steps, "a <question> & more\n" * 20, "model"))
        assert picture.tag.endswith("svg")
        shown = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
        for method in ("ar", "jacobi"):
            pieces = [piece.text for piece in fragments(steps_of(steps, method))]
            assert pieces and set(pieces) <= set(shown)


def test_lines_wrap_and_the_last_ones_are_kept() -> None:
    steps = long_steps("word " * 300 + "\nend")
    pieces = fragments(steps)
    assert max(f.column + len(f.text) for f in pieces) <= COLUMNS
    assert {f.line for f in pieces} == set(range(LINES)) and pieces[-1].text == "end"


def long_steps(text: str):
    from cllm.serving.demo.race import Gained, Step

    return [Step("ar", 1, 0.1, [], [Gained(5, text, "plain")], 1, True)]
