"""Attention without copies of the cache: transformers' own numbers, used while decoding only, and left alone elsewhere."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from tiny import KINDS, tiny_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cllm.attention import GROUPED, SDPA
from cllm.decoding import JacobiDecoder, grouped_attention
from cllm.decoding.grouped_attention import MOST_QUERIES, AttentionPatch

PROMPT = [5, 6, 7, 8, 5, 6]
GROUPS = 3


def inputs(tokens: int, rows: int = 2, heads: int = 2, groups: int = GROUPS, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Those of a layer: views into a cache, and a mask in which one token sees nothing but padding."""
    draw = torch.Generator().manual_seed(tokens)
    query = torch.randn(rows, tokens, heads * groups, 8, generator=draw).to(dtype).transpose(1, 2)
    key, value = (torch.randn(rows, 41, heads, 8, generator=draw).to(dtype)[:, 1:].transpose(1, 2) for _ in "kv")
    hidden = torch.rand(rows, 1, tokens, 40, generator=draw) < 0.5
    hidden[0, 0, 0] = True
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
    return {"query": query, "key": key, "value": value, "attention_mask": mask}


def layer(groups: int = GROUPS):
    return SimpleNamespace(num_key_value_groups=groups, is_causal=True)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What was left to transformers."""
    calls: list[dict] = []

    def own(module, query, key, value, attention_mask, **other):
        calls.append(other)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **other)

    monkeypatch.setattr(grouped_attention, "sdpa_attention_forward", own)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("tokens", [1, 2, 16, MOST_QUERIES])
@torch.inference_mode()
def test_the_same_numbers_without_a_copy(tokens, scaling, dtype, left, monkeypatch):
    given, seen = inputs(tokens, dtype=dtype), []
    expected, _ = sdpa_attention_forward(layer(), **given, scaling=scaling)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(grouped_attention, "scaled_dot_product_attention", lambda q, k, v, **o: seen.append((k, v)) or sdpa(q, k, v, **o))
    found, _ = grouped_attention.grouped_attention(layer(), **given, scaling=scaling, position_ids=torch.arange(tokens))
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous() and not left
    assert [(k is given["key"], v is given["value"]) for k, v in seen] == [(True, True)]


@pytest.mark.parametrize("case", ["no mask", "no group", "many tokens", "a mask per head", "dropout", "unknown", "gradients"])
def test_what_is_left_to_transformers(case, left):
    groups = 1 if case == "no group" else GROUPS
    given = inputs(MOST_QUERIES + 1 if case == "many tokens" else 4, groups=groups)
    other = {"dropout": 0.5} if case == "dropout" else {"position_bias": None} if case == "unknown" else {}
    if case == "no mask":
        given["attention_mask"] = None
    if case == "a mask per head":
        given["attention_mask"] = given["attention_mask"].expand(-1, 2 * GROUPS, -1, -1)
    with torch.inference_mode(case != "gradients"):
        torch.manual_seed(0)
        found, _ = grouped_attention.grouped_attention(layer(groups), **given, **other)
        torch.manual_seed(0)
        expected, _ = sdpa_attention_forward(layer(groups), **given, **other)
    assert torch.equal(found, expected) and len(left) == 1 and other.items() <= left[0].items()


@pytest.mark.parametrize("kind", KINDS)
def test_used_by_the_decoder_and_gone_after_it(kind, left):
    model, seen = tiny_model(kind), []
    own = model.config._attn_implementation  # gemma2, whose scores are capped, is eager in newer releases of transformers
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    iterations = JacobiDecoder(model, 4).iterate([PROMPT], max_new_tokens=8)
    for _ in iterations:
        assert model.config._attn_implementation == own
    assert set(seen) == {GROUPED if own == SDPA else own}
    assert all("softcap" in other for other in left)


def test_nothing_is_left_where_a_forward_fails():
    model = tiny_model()
    model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=4)
    assert model.config._attn_implementation == SDPA


def test_the_last_thread_that_leaves_takes_it_out():
    model, together = tiny_model(), Barrier(2, timeout=60)
    attention = AttentionPatch.for_model(model)

    def enter(first: bool) -> tuple[str, str]:
        with attention:
            together.wait()
            during = model.config._attn_implementation
            JacobiDecoder(model, 4)  # can be made meanwhile
            model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()  # and the model be used
            together.wait()
            if first:
                together.wait()
        if not first:
            after = model.config._attn_implementation
            together.wait()
            return during, after
        return during, GROUPED

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(enter, (True, False))) == [(GROUPED, GROUPED)] * 2
    assert model.config._attn_implementation == SDPA


def test_an_interrupt_that_kept_a_thread_inside_is_mended_by_the_next_text():
    model = tiny_model()
    AttentionPatch.for_model(model).__enter__()
    JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=4)
    assert model.config._attn_implementation == SDPA


@pytest.mark.parametrize("change", ["eager", "asks for sdpa by name"])
def test_models_that_are_left_alone(change):
    model, seen = tiny_model(), []
    if change == "eager":
        model.set_attn_implementation("eager")
    else:
        model._supports_attention_backend = False
    own = model.config._attn_implementation
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=4)
    assert set(seen) == {own}


def test_one_for_all_decoders_of_a_model_which_can_be_copied():
    model = tiny_model()
    decoder = JacobiDecoder(model, 4)
    assert decoder.step.attention is JacobiDecoder(model, 8).step.attention
    twin = copy.deepcopy(decoder)
    assert twin.step.attention is AttentionPatch.for_model(twin.model) is not decoder.step.attention
    texts = [of.generate([PROMPT], max_new_tokens=8)[0].token_ids for of in (decoder, twin)]
    assert texts[0] == texts[1]
