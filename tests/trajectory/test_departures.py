"""Where a response is not the model's own, against plain forwards and plain decoding."""

import random

import pytest
import torch
from tiny import tiny_model

from cllm.decoding import JacobiDecoder
from cllm.trajectory.departures import departures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
def test_the_first_token_that_the_model_would_not_write(kind: str) -> None:
    model, rng = tiny_model(kind, seed=1), random.Random(0)
    prompts = [[rng.randrange(3, 99) for _ in range(length)] for length in (3, 20, 9, 14)]
    responses = [result.token_ids for result in JacobiDecoder(model, 1).generate(prompts, max_new_tokens=16)]
    assert departures(model, prompts, responses) == [None] * 4
    changed = [list(ids) for ids in responses]
    for number, at in ((1, 0), (2, 5), (3, 15)):
        changed[number][at] = changed[number][at] % 90 + 5
    found = departures(model, prompts, changed)
    assert found[0] is None and [departure.token for departure in found[1:] if departure] == [0, 5, 15]
    for prompt, ids, departure in zip(prompts, changed, found):
        if departure:
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + ids[: departure.token]])).logits[0, -1]
            assert departure.margin == pytest.approx(float(logits.max() - logits[ids[departure.token]]), abs=1e-4)
