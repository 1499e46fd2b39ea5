"""Grouped attention gives transformers' numbers without repeating the cache, and is active only during decoding."""

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
    """Inputs of an attention layer: views into a cache, and a mask in which one token sees only padding."""
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
def original_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The calls of transformers' own attention."""
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
def test_same_numbers_without_a_copy(tokens, scaling, dtype, original_calls, monkeypatch):
    given, seen = inputs(tokens, dtype=dtype), []
    expected, _ = sdpa_attention_forward(layer(), **given, scaling=scaling)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(grouped_attention, "scaled_dot_product_attention", lambda q, k, v, **o: seen.append((k, v)) or sdpa(q, k, v, **o))
    found, _ = grouped_attention.grouped_attention(layer(), **given, scaling=scaling, position_ids=torch.arange(tokens))
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous() and not original_calls
    assert [(k is given["key"], v is given["value"]) for k, v in seen] == [(True, True)]


@pytest.mark.parametrize("case", ["no mask", "no group", "many tokens", "a mask per head", "dropout", "unknown", "gradients"])
def test_unsupported_cases_use_the_original(case, original_calls):
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
    assert torch.equal(found, expected) and len(original_calls) == 1 and other.items() <= original_calls[0].items()


@pytest.mark.parametrize("kind", KINDS)
def test_active_only_during_decoding(kind, original_calls):
    model, seen = tiny_model(kind), []
    own = model.config._attn_implementation  # eager for gemma2, whose scores are capped, in newer releases of transformers
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    iterations = JacobiDecoder(model, 4).iterate([PROMPT], max_new_tokens=8)
    for _ in iterations:
        assert model.config._attn_implementation == own
    assert set(seen) == {GROUPED if own == SDPA else own}
    assert all("softcap" in other for other in original_calls)


def test_failing_forward_restores_the_model():
    model = tiny_model()
    model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=4)
    assert model.config._attn_implementation == SDPA


def test_last_thread_to_leave_restores_the_model():
    model, together = tiny_model(), Barrier(2, timeout=60)
    attention = AttentionPatch.for_model(model)

    def enter(first: bool) -> tuple[str, str]:
        with attention:
            together.wait()
            during = model.config._attn_implementation
            JacobiDecoder(model, 4)  # can be created meanwhile
            model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()  # and the model can be used
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


def test_recovers_from_an_interrupt():
    model = tiny_model()
    AttentionPatch.for_model(model).__enter__()
    JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=4)
    assert model.config._attn_implementation == SDPA


@pytest.mark.parametrize("change", ["eager", "asks for sdpa by name"])
def test_unsupported_models_are_not_patched(change):
    model, seen = tiny_model(), []
    if change == "eager":
        model.set_attn_implementation("eager")
    else:
        model._supports_attention_backend = False
    own = model.config._attn_implementation
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=4)
    assert set(seen) == {own}


def test_decoders_of_a_model_share_one_patch_and_can_be_copied():
    model = tiny_model()
    decoder = JacobiDecoder(model, 4)
    assert decoder.step.attention is JacobiDecoder(model, 8).step.attention
    twin = copy.deepcopy(decoder)
    assert twin.step.attention is AttentionPatch.for_model(twin.model) is not decoder.step.attention
    texts = [each.generate([PROMPT], max_new_tokens=8)[0].token_ids for each in (decoder, twin)]
    assert texts[0] == texts[1]
