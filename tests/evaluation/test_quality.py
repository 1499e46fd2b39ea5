"""Quality: exact values on small cases."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from cllm.evaluation.quality import (
    quality,
    quality_table,
    response_nll,
    response_nlls,
    score_replies,
    share_equal,
)
from cllm.tasks import get_task
from cllm.tasks.base import Example, user_turn


def test_shares_are_of_tokens_not_of_responses():
    looping, clean = [1, 2, 3, 4, 1, 2, 3, 4], list(range(10, 34))
    found = quality([looping, clean], eos_ids=[33], nlls=[8.0, 24.0], seed=1)
    assert found.repetition == pytest.approx(8 / 32)
    assert found.nll_per_token == pytest.approx(1.0)
    assert (found.mean_length, found.finished, found.responses) == (16.0, 0.5, 2)
    assert found.score is None and found.same_as_target is None and found.same_as_own_ar is None


def test_comparisons_and_scores():
    responses = [[1, 2], [3]]
    found = quality(responses, eos_ids=[], scores=[True, False], own_ar=responses, target=[[1, 2], [4]])
    assert (found.score, found.same_as_own_ar, found.same_as_target) == (0.5, 1.0, 0.5)
    assert found.score_interval == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_no_responses():
    with pytest.raises(ValueError, match="no responses"):
        quality([], eos_ids=[])
    assert quality([[]], eos_ids=[1]).repetition == 0


def test_share_equal():
    assert share_equal([[1], [2, 3]], [(1,), (2, 4)]) == 0.5


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("length", [1, 9, 150])
def test_nll_equals_token_by_token(kind, length):
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(length)
    prompt, response = [5, 6, 7], torch.randint(3, 90, (length,), generator=generator).tolist()
    expected = 0.0
    with torch.no_grad():
        for at, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:at]])).logits[0, -1].double()
            expected -= float(logits.log_softmax(-1)[token])
    assert response_nll(model, prompt, response) == pytest.approx(expected, rel=1e-4)


def test_nlls_leave_the_mode_alone_and_take_empty_responses():
    model = tiny_model().train()
    assert response_nlls(model, [[5], [6]], [[], [7]])[0] == 0.0
    assert model.training


def test_scores_are_of_the_decoded_text():
    tokenizer, task = tiny_tokenizer(), get_task("gsm8k")
    example = Example(user_turn("?"), None, "18")
    replies = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in ("#### 18", "19")]
    assert score_replies(task, [example, example], replies, tokenizer) == [True, False]


def test_what_cannot_be_judged_has_no_score():
    tokenizer, task = tiny_tokenizer(), get_task("gsm8k")
    asked = ({"role": "user", "content": "?"},)
    examples, replies = [Example(asked, None, "18"), Example(asked)], [tokenizer("#### 18").input_ids] * 2
    assert score_replies(task, examples, replies, tokenizer) == [True]
    assert score_replies(task, examples[1:], replies[1:], tokenizer) is None


def test_the_table_stands_side_by_side():
    mine = quality([[1, 2]], eos_ids=[2], scores=[True], nlls=[1.0], own_ar=[[1, 2]], target=[[1, 3]])
    target = quality([[1, 3]], eos_ids=[2], scores=[False], nlls=[0.5])
    lines = quality_table({"test model": mine, "target model": target}, "accuracy").splitlines()
    assert lines[0].split() == ["test", "model", "target", "model"]
    cells = {line[:34].strip(): line[34:].split() for line in lines[2:]}
    assert cells["accuracy"][0] == "100.0%" and "0.0%" in cells["accuracy"]
    assert cells["same text as own AR"] == ["100.0%", "-"]
    assert cells["same text as the target model"] == ["0.0%", "-"]
