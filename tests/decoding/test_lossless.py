"""With a consistency adapter, the text is the base model's, whatever the adapter's weights."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from cases import draw_case, draw_drafts, generate
from tiny import KINDS, random_adapter, tiny_model
from torch import nn
from transformers import DynamicCache

from cllm.adapter import Adapter, attach, attached
from cllm.decoding import JacobiDecoder, Queue, Request, Sampling
from cllm.decoding.runner import CapturingRunner, CompiledStep, Runner
from cllm.decoding.sampling import Chooser
from cllm.errors import UsageError

PROMPT = [5, 6, 7, 8, 5, 6, 9, 11, 3, 4, 5, 6, 2, 8, 13, 21, 5]  # longer than the tiny models' windows
SAMPLED = Sampling(temperature=0.9, top_k=20, repetition_penalty=1.1, seed=3)


def model_of(kind: str = "llama", **changes: Any):
    return tiny_model(kind, vocab_size=97, eos_token_id=None, **changes)


def merged(model, adapter: Adapter):
    """A copy of the model with the adapter in its weights."""
    model = copy.deepcopy(model)
    layers = dict(model.named_modules())
    for name, down in adapter.down.items():
        layers[name].weight.data += adapter.up[name] @ down
    return model


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("kind", KINDS)
def test_texts_equal_generate(kind: str) -> None:
    for number in range(12):
        case = draw_case(f"lossless {number}", kind=kind, **draw_drafts(number))
        assert case.decode() == case.expected(), case


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_adapter_does_not_change_logits_of_verify_tokens(kind: str, dtype: torch.dtype, batch: int) -> None:
    """Bit for bit, for equal shapes. The logits of draft tokens do change."""
    model = model_of(kind).to(dtype)
    found = [logits(model, adapter, batch, drafts=5) for adapter in (random_adapter(model), None)]
    verify, drafts = ([one[:, part] for one in found] for part in (slice(-5), slice(-5, None)))
    assert torch.equal(*verify)
    assert not torch.isclose(*drafts).all()


def logits(model, adapter: Adapter | None, batch: int, drafts: int) -> torch.Tensor:
    """The logits of a prefill and six verify tokens, then of the draft tokens."""
    decoder = JacobiDecoder(model, 6, adapter=adapter or random_adapter(model), drafts=drafts)
    decoder.step.adapter = adapter
    decoder.step.linears.refresh(adapter)
    rows = decoder._new_batch([Request([*PROMPT[: 9 + n]], 20) for n in range(batch)], range(batch))
    tokens, positions, drafts = decoder.step.inputs(rows.rows, 6)
    return decoder.step.forward(tokens, positions, rows.cache, 32, tokens.shape[1], drafts)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_draft_tokens_use_the_adapter_on_a_cache_made_without_it(kind: str) -> None:
    model = model_of(kind)
    adapter = random_adapter(model, size=0.2)
    decoder = JacobiDecoder(model, 4, adapter=adapter)
    decoder.step.linears.refresh(adapter)
    seen = []
    model.register_forward_hook(lambda _, __, output: seen.append(output.logits))
    iteration = next(decoder.iterate([PROMPT], max_new_tokens=20))
    guesses = iteration.window_BW[0, 1:].tolist()
    cache = DynamicCache(config=model.config)
    model(torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
    positions = torch.arange(len(PROMPT), len(PROMPT) + 3)[None]
    expected = merged(model, adapter)(torch.tensor([guesses]), past_key_values=cache, position_ids=positions).logits
    torch.testing.assert_close(seen[0][:, -3:], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [1, 4, 16])
@pytest.mark.parametrize("drafts", [0, 3, 20])
def test_sampled_texts_equal_those_of_width_1(width: int, drafts: int) -> None:
    model = model_of("gemma3")
    prompts = [PROMPT, [4, 5], [9]]
    expected = JacobiDecoder(model, 1).generate(prompts, max_new_tokens=30, sampling=SAMPLED)
    decoder = JacobiDecoder(model, width, adapter=random_adapter(model), drafts=drafts)
    found = decoder.generate(prompts, max_new_tokens=30, sampling=SAMPLED)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]


@pytest.mark.parametrize("chunk", [3, 8])
def test_long_prompts_in_chunks(chunk: int) -> None:
    model = model_of("gemma2")
    decoder = JacobiDecoder(model, 6, adapter=random_adapter(model), prefill_chunk=chunk)
    found = decoder.generate([PROMPT * 3, [1, 2]], max_new_tokens=25)
    assert [r.token_ids for r in found] == [generate(model, prompt, 25, []) for prompt in (PROMPT * 3, [1, 2])]


def test_end_of_the_context() -> None:
    model = model_of(max_position_embeddings=32)
    (result,) = JacobiDecoder(model, 8, adapter=random_adapter(model)).generate([PROMPT], max_new_tokens=100)
    assert len(result.token_ids) == 32 - len(PROMPT) and result.stop == "context"
    assert result.token_ids == generate(model, PROMPT, 32 - len(PROMPT), [])


# -------------------------------------------------------------------------------------------------------------- drafts


@pytest.mark.parametrize(("width", "drafts", "gained"), [(2, 2, [2]), (4, 6, [4]), (4, 9, [4]), (4, 3, [4, 1])])
def test_drafts_become_the_next_guesses(width: int, drafts: int, gained: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With draft tokens that lead to the right text, an iteration gains all that it verifies.

    D draft tokens reach D + 1 positions ahead, so fewer than 2 (K - 1) leave the next window with nothing but fresh guesses.
    """
    model = model_of()
    truth = torch.tensor([[*PROMPT, *generate(model, PROMPT, 80, [])]])

    def knows(self: Chooser, at: Any) -> torch.Tensor:
        return truth[:, int(at.start_B) + 1 :][:, : at.window_BW.shape[1]]

    monkeypatch.setattr(Chooser, "guess", knows)
    (result,) = JacobiDecoder(model, width, adapter=random_adapter(model), drafts=drafts).generate([PROMPT], max_new_tokens=60)
    assert result.token_ids == truth[0, len(PROMPT) : len(PROMPT) + 60].tolist()
    middle = result.accepted[2:-1]
    assert middle in [([*gained, *gained] * 60)[start:][: len(middle)] for start in range(len(gained))]


def test_attached_adapter_is_the_default() -> None:
    model = model_of()
    plain = JacobiDecoder(model, 6)
    assert plain.step.drafts == 0 and plain.step.adapter is None
    attach(model, adapter := random_adapter(model))
    step = JacobiDecoder(model, 6).step
    assert step.adapter is adapter is attached(model) and (step.verified, step.drafts, step.width) == (6, 5, 6)
    assert JacobiDecoder(model, 6, adapter=None).step.adapter is None
    assert JacobiDecoder(model, 1).step.drafts == 0
    attach(model, None)
    assert attached(model) is None and JacobiDecoder(model, 6).step.adapter is None


def test_window_narrows_near_the_end_of_a_row() -> None:
    model = model_of()
    decoder, lengths = JacobiDecoder(model, 8, adapter=random_adapter(model)), []
    model.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    decoder.generate([PROMPT], max_new_tokens=12)
    assert max(lengths[1:]) <= 15 and lengths[-1] < 15


# ----------------------------------------------------------------------------------------------- runners, side effects


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_compiled_steps(kind: str) -> None:
    model = model_of(kind)
    decoder = JacobiDecoder(model, 4, adapter=random_adapter(model))
    torch._dynamo.reset()
    step = CompiledStep(decoder.step, "eager")
    decoder.runner = Runner(step)
    found = decoder.generate([PROMPT, [4]], max_new_tokens=20)
    expected = JacobiDecoder(model, 4, adapter=random_adapter(model), compile="off").generate([PROMPT, [4]], max_new_tokens=20)
    assert step.compiled is not step.plain
    assert found == expected  # including the number of forwards


def test_captured_steps() -> None:
    model = model_of("qwen3")
    expected = JacobiDecoder(model, 6, adapter=random_adapter(model))
    decoder = JacobiDecoder(model, 6, adapter=random_adapter(model))
    decoder.runner = CapturingRunner(decoder.step, lambda step: step)
    requests = [Request([1 + n, 2, 3][: 1 + n % 3], 10 + 3 * n) for n in range(8)]
    for _ in range(2):  # in the second round everything is captured
        texts = [{n: r.token_ids for n, r in Queue(each, 3).run(requests)} for each in (decoder, expected)]
        assert texts[0] == texts[1]


def test_two_threads_with_two_adapters_of_one_model() -> None:
    model = model_of()
    decoders = [JacobiDecoder(model, 6, adapter=random_adapter(model, seed)) for seed in (1, 2)] + [JacobiDecoder(model, 6)]
    expected = [decoder.generate([PROMPT], max_new_tokens=60) for decoder in decoders]
    found: dict[int, list] = {}

    def work(number: int) -> None:
        found[number] = [decoders[number].generate([PROMPT], max_new_tokens=60) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [expected[number]] * 3 for number in range(3)}


def test_model_is_unchanged_afterwards() -> None:
    model = model_of()
    before, weights = model(torch.tensor([PROMPT])).logits, copy.deepcopy(model.state_dict())
    decoder = JacobiDecoder(model, 6, adapter=random_adapter(model))
    for _ in decoder.iterate([PROMPT], max_new_tokens=20):
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(model(torch.tensor([PROMPT])).logits, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_layers_with_a_replaced_forward() -> None:
    """As accelerate does to move layers between devices."""
    model = model_of()
    expected = JacobiDecoder(model, 6, adapter=random_adapter(model)).generate([PROMPT], max_new_tokens=30)
    layer: Any = model.model.layers[1].mlp.down_proj
    own = layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    assert JacobiDecoder(model, 6, adapter=random_adapter(model)).generate([PROMPT], max_new_tokens=30) == expected
    assert layer.__dict__["forward"] is own


# --------------------------------------------------------------------------------------------------------- bad input


def test_bad_input() -> None:
    model = model_of()
    adapter = random_adapter(model)
    with pytest.raises(UsageError, match="window must be 'sliding' with a consistency adapter, got 'block'"):
        JacobiDecoder(model, 4, adapter=adapter, window="block")
    with pytest.raises(UsageError, match="drafts need an adapter, but the model has none; got drafts=3"):
        JacobiDecoder(model, 4, drafts=3)
    with pytest.raises(UsageError, match="drafts must be between 0 and the context length 256 - 1, got -1"):
        JacobiDecoder(model, 4, adapter=adapter, drafts=-1)
    with pytest.raises(UsageError, match="it has no model.layers.2.mlp.down_proj|trained for another model"):
        attach(model_of(num_hidden_layers=2), adapter)
    with pytest.raises(UsageError, match="maps 48 to 32 features; the adapter needs 64 to 32"):
        name = "model.layers.0.mlp.down_proj"
        attach(model_of(intermediate_size=48), Adapter({name: adapter.down[name]}, {name: adapter.up[name]}))
