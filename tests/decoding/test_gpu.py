"""Captured and compiled steps on a CUDA device."""

import pytest
import torch
from tiny import KINDS, random_adapter, tiny_model

from cllm.decoding import JacobiDecoder, Queue, Request, Sampling
from cllm.decoding.guess import STRATEGIES
from cllm.decoding.runner import CapturingRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_captured_steps_give_the_same_texts(mode: str) -> None:
    """All kinds of models and fresh guesses; rows join and leave, greedy ones next to sampled ones."""
    for kind in KINDS:
        model = tiny_model(kind, vocab_size=97, eos_token_id=None).cuda()
        wanted = [Request([1 + n, 2, 3][: 1 + n % 3], 10 + 3 * n, Sampling(temperature=0.9 * (n % 3 == 2), seed=n)) for n in range(8)]
        plain = dict(Queue(JacobiDecoder(model, 1, compile="off"), 3).run(wanted))
        for guess in STRATEGIES:
            decoder = JacobiDecoder(model, 6, guess=guess, compile=mode)
            found = dict(Queue(decoder, 3).run(wanted))
            assert {n: r.token_ids for n, r in found.items()} == {n: r.token_ids for n, r in plain.items()}, (kind, guess)


@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_captured_steps_with_an_adapter(mode: str) -> None:
    for kind in KINDS:
        model = tiny_model(kind, vocab_size=97, eos_token_id=None).cuda()
        wanted = [Request([1 + n, 2, 3][: 1 + n % 3], 10 + 3 * n) for n in range(8)]
        expected = dict(Queue(JacobiDecoder(model, 1, compile="off"), 3).run(wanted))
        decoder = JacobiDecoder(model, 6, adapter=random_adapter(model), drafts=9, compile=mode)
        found = dict(Queue(decoder, 3).run(wanted))
        assert {n: r.token_ids for n, r in found.items()} == {n: r.token_ids for n, r in expected.items()}, kind


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
