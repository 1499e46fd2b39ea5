"""For every decoder-only family of transformers, the text is Hugging Face's greedy text, or the model is refused."""

from dataclasses import replace

import pytest
import torch
from cases import generate
from families import AROUND_THE_SWITCH, SWITCH, VOCABULARY, WINDOW, build, drawn, longrope, text_families
from tiny import random_adapter
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cllm.attention import TRAINABLE, check_model
from cllm.decoding import JacobiDecoder, Queue, Request, Sampling
from cllm.decoding.self_test import FAMILIES, largest_logit_error
from cllm.errors import UnsupportedModelError, UsageError
from cllm.packing import Block, PackedRow, pack, packed_mask

EQUAL = "equal"
PROMPTS = [[5, 6, 7], list(range(3, 12)), [index % 7 * 11 % 90 + 3 for index in range(30)]]
NEW_TOKENS = 24  # well beyond the sliding window
NOT_BUILT = {"blt", "dots3_note_text", "qwen4_exp_text", "zamba", "zamba2"}
FEW = ("cohere2", "deepseek_v3", "gpt2", "gpt_neox", "gpt_oss", "olmo3", "phi", "starcoder2")


def outcome(model: PreTrainedModel) -> str:
    """EQUAL, or why the model is refused; fails if texts or logits differ."""
    try:
        decoders = [JacobiDecoder(model, width) for width in (1, 8)]
    except UnsupportedModelError as error:
        return str(error)
    expected = [generate(model, prompt, NEW_TOKENS, []) for prompt in PROMPTS]
    requests = [Request(prompt, NEW_TOKENS) for prompt in PROMPTS]
    for decoder in decoders:
        assert texts(decoder, requests) == expected, (model.config.model_type, decoder.block_size)
    assert largest_logit_error(decoders[-1].step, longest=3 * WINDOW, width=8) < 1e-3, model.config.model_type
    assert packed_difference(model) < 1e-3, model.config.model_type
    return EQUAL


def texts(decoder: JacobiDecoder, requests: list[Request]) -> list[list[int]]:
    """Texts decoded four rows at a time."""
    found = dict(Queue(decoder, 4).run(requests))
    return [found[number].token_ids for number in range(len(requests))]


@torch.no_grad()
def packed_difference(model: PreTrainedModel) -> float:
    """The largest difference between block logits in a packed forward and in plain ones, in standard deviations."""
    clean, blocks = PROMPTS[2], [Block(9, PROMPTS[1]), Block(21, PROMPTS[0])]
    row = PackedRow(clean, blocks)
    ids, layout = pack([row, PackedRow(PROMPTS[1])], pad_token_id=0)
    mask = packed_mask(model.config, layout, layout, model.dtype)
    packed = model(input_ids=ids, attention_mask=mask, position_ids=layout.position_BT, use_cache=False).logits[0]
    pairs = []
    for block, at in zip(blocks, row.offsets(), strict=True):
        text = torch.tensor([[*clean[: block.start], *block.tokens]])
        plain = model(input_ids=text, position_ids=torch.arange(text.shape[1])[None], use_cache=False).logits[0]
        pairs.append((packed[at : at + len(block.tokens)], plain[block.start :]))
    found, expected = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize("name", FEW)
def test_some_families(name: str) -> None:
    assert name in FAMILIES and outcome(build(name)) == EQUAL


@pytest.mark.slow
def test_all_families() -> None:
    found = {}
    for name in text_families():
        try:
            model = build(name)
        except Exception as error:
            found[name] = f"not built: {error}"
            continue
        found[model.config.model_type] = outcome(model)
    lines = [f"{name}: {result}" for name, result in sorted(found.items())]
    equal = {name for name, result in found.items() if result == EQUAL}
    assert equal == FAMILIES & found.keys(), "\n".join(lines)  # another release may have fewer
    assert {name for name, result in found.items() if result.startswith("not built")} <= NOT_BUILT, "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt_neo", {}, "masks by the length of its cache"),
        ("gpt_neo", {"attention_types": [[["local"], 4]]}, "masks by the length of its cache"),
        ("bloom", {}, "no position_ids"),
        ("mpt", {}, "no position_ids"),
        ("falcon", {"alibi": True}, "alibi"),
        ("big_bird", {}, "block-sparse"),
        ("openai-gpt", {}, "no cache"),
        ("roformer", {}, "no position_ids"),
    ],
)
def test_refusal_gives_the_reason(name: str, changes: dict, reason: str) -> None:
    model = build(name, **changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        JacobiDecoder(model, 4)
    with pytest.raises(UnsupportedModelError, match=reason):
        check_model(model, TRAINABLE)  # packed training needs the same


# ------------------------------------------------------- frequencies that depend on the length of a text


def across_the_switch(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, eos: list[int]) -> list[int]:
    """Hugging Face's text; Phi's without a cache, since it recomputes all at the switch, where transformers 5.17 loses the prompt."""
    return generate(model, prompt, max_new_tokens, eos, use_cache=not model.config.model_type.startswith("phi"))


@pytest.mark.parametrize("name", ["llama", "phi3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("phimoe", "gemma3_text"))])
def test_longrope(name: str) -> None:
    """Rows before, across and beyond the switch in one batch, chunked prompts, and drafts of an adapter."""
    model = longrope(name)
    expected = [across_the_switch(model, list(r.prompt), r.max_new_tokens, []) for r in AROUND_THE_SWITCH]
    adapter = random_adapter(model)
    for options in (
        {"block_size": 1},
        {"block_size": 8, "prefill_chunk": 16},
        {"block_size": 5, "window": "block"},
        {"block_size": 6, "adapter": adapter, "drafts": 9},
    ):
        assert texts(JacobiDecoder(model, **options), AROUND_THE_SWITCH) == expected, options


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_longrope_stops_at_the_switch(name: str) -> None:
    """With an end-of-sequence token where the text would be recomputed."""
    model, text = longrope(name), drawn(9)
    free = across_the_switch(model, text, 60, [])
    for place in (SWITCH - len(text) - 1, SWITCH - len(text), SWITCH - len(text) + 1):
        eos = [free[place]]
        (result,) = JacobiDecoder(model, 8, eos_token_ids=eos).generate([text], max_new_tokens=60)
        assert result.token_ids == across_the_switch(model, text, 60, eos) and result.stop == "eos"


def test_longrope_with_sampling() -> None:
    """Samples depend neither on the width nor on when the text is recomputed."""
    model, sampling = longrope("phi3"), Sampling(temperature=1.0, seed=5)
    wanted = [replace(request, sampling=sampling) for request in AROUND_THE_SWITCH]
    ar, jacobi = (texts(JacobiDecoder(model, width), wanted) for width in (1, 8))
    assert ar == jacobi


def test_longrope_patch_is_removed() -> None:
    model = longrope("llama")
    ids = torch.tensor([drawn(40)])
    before = model(ids).logits
    for _ in JacobiDecoder(model, 4).iterate([drawn(9)], max_new_tokens=40):
        assert not any("forward" in vars(module) for module in model.modules())
    assert before.equal(model(ids).logits)


def test_longrope_is_not_compiled() -> None:
    with pytest.raises(UsageError, match="longrope"):
        JacobiDecoder(longrope("llama"), 4, compile="compile")


def test_packed_texts_stay_below_the_switch() -> None:
    model = longrope("phi3")
    assert packed_difference(model) < 1e-3
    ids, layout = pack([PackedRow(drawn(9)), PackedRow(drawn(SWITCH + 1))], pad_token_id=0)
    with pytest.raises(UsageError, match="texts of phi3 must have at most 32 tokens, .* got 33"):
        packed_mask(model.config, layout, layout, model.dtype)


def test_dynamic_frequencies() -> None:
    """They change beyond the context, where rows end; state that longer texts left in the model does no harm."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = build("llama", max_position_embeddings=48, rope_parameters=rope)
    expected = [generate(model, drawn(length), 48 - length, []) for length in (5, 20, 47)]
    generate(model, drawn(9), 80, [])
    results = JacobiDecoder(model, 8).generate([drawn(length) for length in (5, 20, 47)], max_new_tokens=80)
    assert [result.token_ids for result in results] == expected
    assert {result.stop for result in results} == {"context"}


# ------------------------------------------------------------------------------ families that no test covers


class NewConfig(LlamaConfig):
    model_type = "brand_new"


class New(LlamaForCausalLM):
    """A model of an untested family, with or without a fault."""

    config_class = NewConfig
    fault = ""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if self.fault == "no positions":
            position_ids = None
        if self.fault == "no mask":
            attention_mask = None
        if self.fault == "raises" and attention_mask is not None:
            batch, length = attention_mask.shape
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


def new_model(fault: str = "") -> New:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = New(NewConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).eval()
    model.fault = fault
    return model


def test_unknown_family_is_self_tested_once() -> None:
    model, calls = new_model(), []
    model.register_forward_pre_hook(lambda *_: calls.append(None))
    JacobiDecoder(model, 4)
    assert len(calls) == 4
    JacobiDecoder(model, 8)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no positions", "brand_new does not compute AR decoding's logits"),
        ("no mask", "brand_new does not compute AR decoding's logits"),
        ("raises", "brand_new fails with the masks and positions of Jacobi decoding: too many values to unpack"),
    ],
)
def test_unknown_family_with_a_fault_is_refused(fault: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        JacobiDecoder(new_model(fault), 4)


def test_self_test_does_not_hide_out_of_memory() -> None:
    model = new_model()

    def fail(*_: object) -> None:
        raise MemoryError

    model.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        JacobiDecoder(model, 4)
