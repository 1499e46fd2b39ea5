"""Jacobi decoding inside transformers' ``generate``: the same outputs as without it, and what it refuses."""

from typing import Any

import pytest
import torch
from tiny import EOS_ID, KINDS, PAD_ID, random_adapter, tiny_model, tiny_tokenizer
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
)

import cllm
from cllm.adapter import attach
from cllm.custom_generate import JacobiOutput, generate
from cllm.decoding import JacobiDecoder, Sampling
from cllm.errors import UsageError

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [44], [9, 22, 30, 9]]


def padded(prompts: list[list[int]] = PROMPTS) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD_ID] * (longest - len(p)) + p for p in prompts])
    return {"input_ids": ids, "attention_mask": (ids != PAD_ID).long()}


def ready(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    model = tiny_model(kind, seed, **changes)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return ready()


class Counting(LogitsProcessor):
    """A stateful processor: it prefers another token after its fifth call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores[:, 40 + self.calls // 5] += 100
        return scores


class RecordingCriteria(StoppingCriteria):
    """Stops each row at a token of its own, and records its arguments."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.seen = torch.tensor(tokens), []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        return input_ids[:, -1] == self.tokens


class RecordingStreamer:
    """A streamer that records what it gets."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_sequences_equal_those_of_generate(kind: str) -> None:
    model = ready(kind, seed=4)
    for prompts in (PROMPTS, PROMPTS[:1]):
        inputs = padded(prompts)
        output = model.generate(**inputs, max_new_tokens=30, custom_generate=cllm.jacobi)
        assert torch.equal(output, model.generate(**inputs, max_new_tokens=30))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
        {"bad_words_ids": [[5], [6, 7]], "min_new_tokens": 10},
        {"sequence_bias": [[[50], 4.0]], "repetition_penalty": 2.0},
        {"suppress_tokens": [40, 41], "begin_suppress_tokens": [50]},
        {"forced_eos_token_id": EOS_ID},
        {"exponential_decay_length_penalty": (5, 1.5)},
        {"prefix_allowed_tokens_fn": lambda row, text: [row + 10, row + 11, int(text[-1]), int(text.sum()) % 90 + 3]},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=5)]},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.5)]},  # reads padding as well
        {"eos_token_id": [30, 31, 60]},
    ],
    ids=lambda options: "+".join(options),
)
def test_logits_processors_work_unchanged(model: PreTrainedModel, options: dict[str, Any]) -> None:
    inputs = padded() | {"max_new_tokens": 24} | options
    assert torch.equal(model.generate(**inputs, custom_generate=cllm.jacobi), model.generate(**inputs))


def test_stateful_processors(model: PreTrainedModel) -> None:
    """With a single row they are called once per token in order, so they work. In a batch the order differs from AR's."""
    outputs = []
    for more in ({}, {"custom_generate": cllm.jacobi}):
        counting = Counting()
        inputs = padded(PROMPTS[:1]) | {"max_new_tokens": 24, "logits_processor": LogitsProcessorList([counting])}
        outputs.append(model.generate(**inputs, **more))
        assert counting.calls == 24
    assert torch.equal(*outputs)
    with pytest.raises(UsageError, match="Counting keeps state, so it takes one prompt at a time, got 4"):
        processors = LogitsProcessorList([Counting()])
        model.generate(**padded(), max_new_tokens=24, logits_processor=processors, custom_generate=cllm.jacobi)


def test_stopping_criteria_are_called_as_in_generate(model: PreTrainedModel) -> None:
    plain = model.generate(**padded(), max_new_tokens=30)
    tokens = [int(row[5 + at]) for row, at in zip(plain, (3, 9, 1, 20))]
    seen = []
    for more in ({}, {"custom_generate": cllm.jacobi}):
        criterion = RecordingCriteria(*tokens)
        output = model.generate(**padded(), max_new_tokens=30, stopping_criteria=[criterion], **more)
        seen.append((criterion.seen, output.tolist()))
    assert seen[0] == seen[1]


def test_stop_strings_and_streamer(model: PreTrainedModel) -> None:
    """Exported checkpoints take both; transformers passes neither to a plain callable."""
    tokenizer = tiny_tokenizer()
    inputs = padded(PROMPTS[:1]) | {"max_new_tokens": 30}
    text = tokenizer.decode(model.generate(**inputs)[0, 3:])
    asked = inputs | {"stop_strings": [text[12:14]], "tokenizer": tokenizer}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = generate(**asked, model=model, streamer=streamer)
    assert torch.equal(output, model.generate(**asked)) and output.shape[1] < 3 + 30
    assert "".join(streamer) == tokenizer.decode(output[0, 3:])
    configured = GenerationConfig(stop_strings=[text[12:14]], max_new_tokens=30)
    assert torch.equal(generate(**padded(PROMPTS[:1]), generation_config=configured, model=model, tokenizer=tokenizer), output)
    with pytest.raises(UsageError, match="pass tokenizer="):
        generate(**inputs, stop_strings=["a"], model=model)
    with pytest.raises(UsageError, match="takes no draft model"):
        generate(**inputs, assistant_model=model, model=model)


def test_streaming(model: PreTrainedModel) -> None:
    for prompts in (PROMPTS, PROMPTS[:1]):
        streamer = RecordingStreamer()
        output = generate(**padded(prompts), max_new_tokens=20, model=model, streamer=streamer)
        prompt, *steps = streamer.values
        assert torch.equal(prompt, padded(prompts)["input_ids"]) and streamer.ended
        new = torch.stack(steps, dim=1) if len(prompts) > 1 else torch.cat(steps)[None]
        assert torch.equal(torch.cat([prompt, new], dim=1), output)


def test_sampling_equals_the_engines(model: PreTrainedModel) -> None:
    """Each row draws with a seed derived from the given one, in any batch and with any processors."""
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    inputs = padded() | {"max_new_tokens": 20, "custom_generate": cllm.jacobi, "seed": 3} | options
    output = model.generate(**inputs)
    del options["do_sample"]
    samplings = [Sampling(**options, seed=3).derive(str(row)) for row in range(4)]
    expected = JacobiDecoder(model, eos_token_ids=[EOS_ID]).generate(PROMPTS, max_new_tokens=20, sampling=samplings)
    for row, result in zip(output[:, 5:].tolist(), expected, strict=True):
        assert row == result.token_ids + [PAD_ID] * (len(row) - len(result.token_ids))
    assert torch.equal(model.generate(**inputs, renormalize_logits=True), output)  # through transformers' processors
    assert not torch.equal(model.generate(**inputs | {"seed": 4}), output)


def test_the_seed_comes_from_torch(model: PreTrainedModel) -> None:
    inputs = padded(PROMPTS[:1]) | {"do_sample": True, "max_new_tokens": 20, "custom_generate": cllm.jacobi}
    torch.manual_seed(0)
    first, second = (model.generate(**inputs, num_return_sequences=2) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, num_return_sequences=2), first)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_the_output_dictionary_and_the_width(model: PreTrainedModel) -> None:
    inputs = padded() | {"max_new_tokens": 20, "custom_generate": cllm.jacobi, "return_dict_in_generate": True}
    output, single = model.generate(**inputs), model.generate(**inputs, block_size=1)
    assert isinstance(output, JacobiOutput) and torch.equal(output.sequences, single.sequences)
    lengths = [row.index(EOS_ID) + 1 if EOS_ID in row else 20 for row in single.sequences[:, 5:].tolist()]
    assert single.forwards.tolist() == lengths and sum(output.forwards) < sum(lengths)


def test_an_attached_adapter_drafts() -> None:
    """By default on all guesses of the window, and without changing the text."""
    model = ready(seed=4)
    lengths: list[int] = []
    hook = {"with_kwargs": True}
    model.register_forward_pre_hook(lambda model, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), **hook)
    inputs = padded() | {"max_new_tokens": 30}
    plain = model.generate(**inputs)
    attach(model, random_adapter(model))
    for more, most in (({}, 4 + 3), ({"drafts": 2}, 4 + 2), ({"drafts": 0}, 4)):
        lengths.clear()
        assert torch.equal(model.generate(**inputs, block_size=4, custom_generate=cllm.jacobi, **more), plain)
        assert max(lengths[1:]) == most
    attach(model, None)
    with pytest.raises(UsageError, match="drafts need an adapter, but the model has none; got drafts=2"):
        model.generate(**inputs, drafts=2, custom_generate=cllm.jacobi)


def test_a_row_ends_at_the_end_of_the_context() -> None:
    model = ready(seed=1, max_position_embeddings=16)
    output = model.generate(**padded(), max_new_tokens=30, custom_generate=cllm.jacobi, block_size=4, eos_token_id=None)
    for row, prompt in zip(output[:, 5:].tolist(), PROMPTS):
        assert not any(row[16 - len(prompt) :]) and len(row) == 15


def test_prompts_as_a_positional_argument(model: PreTrainedModel) -> None:
    inputs = padded(PROMPTS[:1])["input_ids"]
    assert torch.equal(generate(inputs, model=model, max_new_tokens=8), model.generate(inputs, max_new_tokens=8))
    assert torch.equal(
        generate(inputs, model=model, max_new_tokens=8, custom_generate=cllm.jacobi), model.generate(inputs, max_new_tokens=8)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "greedy search or sampling, got beam search"),
        ({"prompt_lookup_num_tokens": 3}, "got assisted generation"),
        ({"output_scores": True, "return_dict_in_generate": True}, "gives sequences only, got output_scores"),
        ({"past_key_values": "full"}, "starts from an empty cache"),
        ({"position_ids": torch.arange(3)[None] + 1}, "counts positions from each row's first token"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "takes input_ids and attention_mask only, got inputs_embeds"),
        ({"block_size": 0}, "block_size must be between 1 and"),
        ({"guess": "magic"}, "unknown guess 'magic'"),
    ],
    ids=str,
)
def test_refusals(model: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    if "past_key_values" in options:
        options = {"past_key_values": model(input_ids=torch.tensor([[5, 6]]), past_key_values=DynamicCache()).past_key_values}
    with pytest.raises(UsageError, match=message):
        model.generate(**padded(PROMPTS[:1]), max_new_tokens=8, custom_generate=cllm.jacobi, **options)
