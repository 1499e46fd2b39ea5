"""Speed: exact figures from hand-made runs, who goes when, and where responses part."""

import time

import pytest
import torch
from tiny import tiny_model

from cllm.decoding import JacobiDecoder
from cllm.decoding.runner import CapturingRunner
from cllm.evaluation.method import Engine, Response
from cllm.evaluation.speed import Measurement, Run, budget, divergence, divergences, measure, summarise, timed


class Stub:
    """Takes a known time per call, and calls the model once."""

    label = "stub"

    def __init__(self, name, model, log, seconds=0.0, one_by_one=False):
        self.name, self.model, self.log, self.seconds, self.one_by_one = name, model, log, seconds, one_by_one

    def decode(self, prompts, max_new_tokens):
        self.log.append((self.name, len(prompts), max_new_tokens))
        self.model(torch.tensor([prompts[0]]))
        time.sleep(self.seconds)
        return [Response([1] * max_new_tokens, max_new_tokens) for _ in prompts]


def run(seconds, *responses):
    return Run(seconds, seconds / 10, list(responses))


def test_figures_of_hand_made_runs():
    ar = [run(2.0, Response([1] * 8, 8, 0, 0)), run(1.0, Response([2] * 4, 4, 0, 0))]
    jacobi = [run(1.0, Response([1] * 8, 4, 4, 1)), run(0.5, Response([2] * 4, 2, 2, 1))]
    other = [run(4.0, Response([1] * 8, 8)), run(2.0, Response([3] * 4, 4))]
    figures = summarise(Measurement({"jacobi": jacobi, "ar": ar, "generate": other}))
    mine = figures["jacobi"]
    assert (mine["tokens"], mine["forwards"], mine["responses"]) == (12, 6, 2)
    assert (mine["tokens_per_forward"], mine["tokens_per_forward_interval"]) == (2.0, (2.0, 2.0))
    assert (mine["speedup"], mine["speedup_interval"]) == (2.0, (2.0, 2.0))
    assert (mine["tokens_per_second"], mine["seconds"]) == (8.0, 1.5)
    assert mine["prefill_seconds"] == pytest.approx(0.15)
    assert (mine["fast_forwarded_per_response"], mine["fast_forwarded_per_forward"]) == (3.0, 1.0)
    assert (mine["stationary_per_response"], mine["stationary_per_forward"]) == (1.0, pytest.approx(1 / 3))
    assert mine["same_as_ar"] == 1.0
    assert (figures["ar"]["speedup"], figures["ar"]["speedup_interval"]) == (1.0, None)
    assert (figures["generate"]["speedup"], figures["generate"]["same_as_ar"]) == (0.5, 0.5)
    assert figures["generate"]["stationary_per_forward"] is None


def test_speedup_is_in_tokens_per_second_not_in_seconds():
    """Half the text in half the time is no gain."""
    ar, short = [run(2.0, Response([1] * 8, 8))], [run(1.0, Response([1] * 4, 4))]
    assert summarise(Measurement({"ar": ar, "jacobi": short}))["jacobi"]["speedup"] == 1.0


def test_methods_take_turns_after_a_warm_up():
    log = []
    methods = [Stub(name, tiny_model(), log) for name in "ab"]
    measured = measure(methods, [[[1]], [[2, 3], [4]], [[5]]], 30)
    assert log[:2] == [("a", 1, 16), ("b", 1, 16)]
    assert [name for name, *_ in log[2:]] == ["a", "b", "b", "a", "a", "b"]
    assert [len(r.responses) for r in measured.runs["a"]] == [1, 2, 1]


def test_every_method_gets_the_same_budget_within_the_context():
    log = []
    measure([Stub(name, tiny_model(), log) for name in "ab"], [[[1] * 20, [1]]], 30, context=32)
    assert log == [("a", 2, 12), ("b", 2, 12), ("a", 2, 12), ("b", 2, 12)]
    assert budget([[1] * 20], 5, 32) == 5 and budget([[1] * 20], 5, None) == 5


def test_time_is_taken_and_prefill_shown_apart():
    stub = Stub("a", tiny_model(), [], seconds=0.05)
    result = timed(stub, [[1, 2], [3]], 4)
    assert 0.05 <= result.seconds < 1
    assert 0 < result.prefill_seconds <= result.seconds - 0.05
    assert not stub.model._forward_hooks


def test_a_prefill_ends_with_the_last_prompt_token(monkeypatch):
    """In whatever pieces a prompt goes through the model. A second here is a forward."""
    model, forwards = tiny_model(), []
    model.register_forward_hook(lambda *_: forwards.append(1.0))
    monkeypatch.setattr("cllm.evaluation.speed.time.perf_counter", lambda: sum(forwards))
    for chunk, expected in ((10, 4), (34, 1)):
        result = timed(Engine(JacobiDecoder(model, 1, prefill_chunk=chunk), "a", "a"), [[3] * 34, [5]], 4)
        assert (result.prefill_seconds, result.seconds) == (expected, expected + 3)


def test_every_method_begins_with_no_prefixes():
    """What the warm-up left would make the first batch quicker."""
    model, tokens = tiny_model(), []
    model.register_forward_hook(lambda _, args, kwargs, output: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    measured = measure([Engine(JacobiDecoder(model, 1), "a", "a")], [[[3] * 90], [[3] * 95]], 1)
    assert tokens == [90, 90, 5]  # the second batch goes on from the first
    assert all(0 < run.prefill_seconds < run.seconds for run in measured.runs["a"])


def test_captured_steps_are_captured_before_the_clock_runs():
    decoder = JacobiDecoder(tiny_model(eos_token_id=None), 1)
    captures = []
    decoder.runner = CapturingRunner(decoder.step, lambda step: captures.append(step) or step)
    warm = []
    measure([Engine(decoder, "a", "a")], [[[3]], [[3] * 60], [[5]]], 20, progress=lambda batches: warm.extend(captures) or batches)
    assert len(warm) == len(captures) > 0


def test_a_method_for_single_prompts_gets_them_one_by_one():
    log = []
    result = timed(Stub("a", tiny_model(), log, seconds=0.02, one_by_one=True), [[1, 2], [3], [4]], 4)
    assert log == [("a", 1, 4)] * 3 and len(result.responses) == 3 and result.seconds >= 0.06


def test_divergence_tells_token_and_margin_of_a_plain_forward():
    model = tiny_model()
    prompt, shared = [5, 6, 7], [11, 12]
    logits = model(torch.tensor([prompt + shared])).logits[0, -1].detach()
    best, second = logits.topk(2).indices.tolist()
    found = divergence(model, prompt, [*shared, best, 4], [*shared, second, 9])
    assert (found["token"], found["ar_choice"], found["other_choice"]) == (2, best, second)
    assert found["plain_choice"] == best
    assert found["margin"] == pytest.approx(float(logits[best] - logits[second]), abs=1e-5)
    turned = divergence(model, prompt, [*shared, second], [*shared, best])
    assert turned["margin"] == pytest.approx(found["margin"], abs=1e-5)


def test_no_divergence_and_a_missing_end():
    model = tiny_model()
    assert divergence(model, [5], [1, 2], [1, 2]) is None
    assert divergence(model, [5], [1, 2, 3], [1, 2])["token"] == 2


def test_divergences_name_method_and_prompt():
    runs = {
        "ar": [run(1.0, Response([1, 2], 2), Response([3, 4], 2))],
        "jacobi": [run(1.0, Response([1, 2], 1), Response([3, 5], 1))],
    }
    found = divergences(tiny_model(), Measurement(runs), {"p": [7], "q": [8]})
    assert [(d["method"], d["id"], d["token"]) for d in found] == [("jacobi", "q", 1)]
