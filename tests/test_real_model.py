"""The claims hold on a real model: SmolLM2-135M-Instruct."""

import os

import pytest
import torch
from sql_questions import questions as generated
from tiny import random_adapter

from cllm.decoding import JacobiDecoder
from cllm.models import load_model, load_tokenizer, stop_token_ids
from cllm.processor import has_amx
from cllm.prompts import PromptTemplate
from cllm.tasks import get_task
from cllm.tasks.source import load_examples

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
PROMPTS, NEW_TOKENS = 4, 32


@pytest.fixture(scope="module")
def smol():
    path = os.environ.get("CLLM_TEST_MODEL")
    if not path:
        pytest.skip("CLLM_TEST_MODEL does not name a model; scripts/test.sh sets it")
    return load_model(path, dtype="float32", device="cpu"), load_tokenizer(path)


def questions(request, count: int) -> list[str]:
    """GSM8K's test questions where available, else generated ones."""
    try:
        folder = request.getfixturevalue("shared_data")
    except pytest.skip.Exception:
        return [row["question"] for row in generated(count)]
    examples = load_examples(get_task("gsm8k"), folder / "gsm8k" / "test.jsonl.gz", "test", count)
    return [example.messages[-1]["content"] for example in examples]


@torch.inference_mode()
def test_real_prompts_equal_generate(request, smol):
    """Ragged batches, without and with an adapter, give the text of Hugging Face's ``generate`` on each prompt alone.

    ``scripts/benchmarks/exactness.py real`` does the same with as many prompts as one likes.
    """
    model, tokenizer = smol
    eos = stop_token_ids(model, tokenizer)
    template = PromptTemplate("chat")
    prompts = [template.encode([{"role": "user", "content": q}], tokenizer) for q in questions(request, PROMPTS)]
    decoder = JacobiDecoder(model, 8, eos_token_ids=eos)
    drafting = JacobiDecoder(model, 8, eos_token_ids=eos, adapter=random_adapter(model, rank=8, size=0.05))
    ours, drafted = (
        [r for i in range(0, PROMPTS, 4) for r in one.generate(prompts[i : i + 4], max_new_tokens=NEW_TOKENS)]
        for one in (decoder, drafting)
    )
    for prompt, result, other in zip(prompts, ours, drafted):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )[0, len(prompt) :]
        assert result.token_ids == other.token_ids == expected.tolist()
    assert sum(len(r.token_ids) for r in ours) > sum(r.forwards for r in ours)  # and in fewer forwards


@pytest.mark.skipif(not has_amx(), reason="no matrix units for bfloat16")
def test_bfloat16_texts_do_not_depend_on_the_width(request, smol):
    """Not even at near-ties, one prompt at a time: all forwards that decide it give a token the same bits."""
    model, tokenizer = load_model(os.environ["CLLM_TEST_MODEL"], dtype="bfloat16", device="cpu"), smol[1]
    template, adapter = PromptTemplate("chat"), random_adapter(model, rank=8, size=0.05)
    one, *others = JacobiDecoder(model, 1), JacobiDecoder(model, 8), JacobiDecoder(model, 6, adapter=adapter, drafts=7)
    for question in questions(request, 4):
        prompt = template.encode([{"role": "user", "content": question}], tokenizer)
        expected = one.generate([prompt], max_new_tokens=NEW_TOKENS)[0].token_ids
        assert [each.generate([prompt], max_new_tokens=NEW_TOKENS)[0].token_ids for each in others] == [expected, expected]
