"""Captured and compiled steps on a CUDA device."""

import pytest
import torch
from tiny import KINDS, random_adapter, tiny_model
from transformers import PreTrainedModel

from cllm.decoding import JacobiDecoder, Queue, Request, Sampling
from cllm.decoding.guess import STRATEGIES
from cllm.decoding.runner import CapturingRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_give_the_same_texts(kind: str) -> None:
    """All fresh guesses; rows join and leave, greedy ones beside sampled ones."""
    model = tiny_model(kind, vocab_size=97, eos_token_id=None).cuda()
    expected = plain(model, sampled=True)
    for guess in STRATEGIES if kind == KINDS[0] else ["context", "pool"]:
        assert texts(JacobiDecoder(model, 6, guess=guess, compile="graph"), sampled=True) == expected, guess


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_with_an_adapter(kind: str) -> None:
    model = tiny_model(kind, vocab_size=97, eos_token_id=None).cuda()
    assert texts(JacobiDecoder(model, 6, adapter=random_adapter(model), drafts=9, compile="graph")) == plain(model)


def test_graphs_are_the_default_on_a_gpu() -> None:
    decoder = JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None).cuda(), 4)
    decoder.generate([[1, 2, 3]], max_new_tokens=40)
    assert isinstance(decoder.runner, CapturingRunner) and decoder.runner.capture
    assert any(callable(known) for known in decoder.runner._kept.captured.values())


def test_host_only_waits_at_the_sync_interval() -> None:
    decoder = JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None).cuda(), 4)
    decoder.sync_interval = 100
    iterations = decoder.iterate([[1, 2, 3], [4]], max_new_tokens=100)
    for _ in range(6):
        next(iterations)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            next(iterations)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("adapted", [False, True])
def test_compiled_steps_give_the_same_texts(adapted: bool) -> None:
    """One kind of model and of step, since compiling takes most of the time."""
    model = tiny_model(vocab_size=97, eos_token_id=None).cuda()
    adapter, drafts = (random_adapter(model), 9) if adapted else (None, 0)
    decoder = JacobiDecoder(model, 6, adapter=adapter, drafts=drafts, compile="compile")
    (result,) = decoder.generate([[1, 2, 3]], max_new_tokens=40)
    assert result.token_ids == JacobiDecoder(model, 1, adapter=None, compile="off").generate([[1, 2, 3]], max_new_tokens=40)[0].token_ids
    assert decoder.runner.step.compiled is not decoder.runner.step.plain


def plain(model: PreTrainedModel, sampled: bool = False) -> dict[int, list[int]]:
    """The texts of AR decoding by steps that are neither captured nor compiled."""
    return texts(JacobiDecoder(model, 1, adapter=None, compile="off"), sampled)


def texts(decoder: JacobiDecoder, sampled: bool = False) -> dict[int, list[int]]:
    """Of eight requests, three rows at a time; every third one is ``sampled``."""
    wanted = [
        Request([1 + n, 2, 3][: 1 + n % 3], 10 + 3 * n, Sampling(temperature=0.9 * (sampled and n % 3 == 2), seed=n)) for n in range(8)
    ]
    return {number: result.token_ids for number, result in Queue(decoder, 3).run(wanted)}
