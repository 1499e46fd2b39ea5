"""The quick look at a model in training, against the slow ways to get the same figures."""

import pytest
import torch
from commands import question_rows
from tiny import EOS_ID, tiny_model, tiny_tokenizer

from cllm.evaluation.probe import Probe
from cllm.evaluation.prompt import encode
from cllm.evaluation.quality import response_nlls
from cllm.prompts import PromptTemplate
from cllm.tasks import get_task
from cllm.trajectory.hygiene import repetition

LENGTH = 12


def make_probe(target) -> Probe:
    task, tokenizer = get_task("gsm8k"), tiny_tokenizer()
    examples = task.read(enumerate(question_rows(4), 1), "test")
    prompts, _ = encode(examples, PromptTemplate("{question}"), tokenizer, None)  # type: ignore[arg-type]
    return Probe(task, prompts, tokenizer, target, 4, "context", LENGTH, [EOS_ID])


def plain_texts(model, probe: Probe) -> list[list[int]]:
    return [model.generate(torch.tensor([p.ids]), max_new_tokens=LENGTH, do_sample=False)[0, len(p.ids) :].tolist() for p in probe.prompts]


def test_its_figures() -> None:
    target, model = tiny_model(seed=1), tiny_model(seed=2)
    probe = make_probe(target)
    figures, texts = probe(model), plain_texts(model, probe)
    tokens = sum(map(len, texts))
    assert figures.prompts == 4 and figures.accuracy in (0, 0.25, 0.5, 0.75, 1)
    assert 1 <= figures.tpf <= 4
    nlls = response_nlls(target, [prompt.ids for prompt in probe.prompts], texts)
    assert figures.nll == pytest.approx(sum(nlls) / tokens, rel=1e-4)
    assert figures.repetition == pytest.approx(sum(repetition(text) * len(text) for text in texts) / tokens)
    entropies = [entropy(model, prompt.ids, text) for prompt, text in zip(probe.prompts, texts)]
    assert figures.entropy == pytest.approx(sum(entropies) / tokens, rel=1e-4)
    assert probe(model) == figures


@torch.no_grad()
def entropy(model, prompt: list[int], response: list[int]) -> float:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return float(-(logits.softmax(-1) * logits.log_softmax(-1)).sum())


def test_a_model_without_numbers_gives_figures_without() -> None:
    model = tiny_model(seed=2)
    model.get_input_embeddings().weight.data[:] = float("nan")
    assert not make_probe(tiny_model(seed=1))(model).finite


def test_a_model_that_trains_with_another_attention() -> None:
    target, model = tiny_model(seed=1), tiny_model(seed=2)
    expected = make_probe(target)(model)
    model.set_attn_implementation("flex_attention")
    assert make_probe(target)(model) == expected
    assert model.config._attn_implementation == "flex_attention"
