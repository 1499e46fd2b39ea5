"""Prefix reuse: known prefixes are not recomputed, texts do not change, and memory stays within the budget."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import BUDGETS, draw_case, follow, reusing
from tiny import KINDS, random_adapter, tiny_model

from cllm.decoding import GREEDY, JacobiDecoder, Queue, Request, Sampling, onednn
from cllm.decoding.cache import RowCache
from cllm.decoding.prefix_cache import DEFAULT_BYTES, PrefixCache
from cllm.decoding.runner import CapturingRunner
from cllm.errors import UsageError
from cllm.options import PREFIX_BYTES

TOKEN = 2 * 2 * 3 * 4  # bytes per token in the caches below: keys and values, 2 layers, 3 float32 numbers


def a_model(kind: str = "llama", **changes: Any) -> Any:
    return tiny_model(kind, **{"vocab_size": 97, "eos_token_id": None, "max_position_embeddings": 512} | changes)


def states(text: list[int]) -> torch.Tensor:
    """Fake keys [T, 1, 3] of a text, whose negatives are its values; each depends on all tokens up to its own."""
    values = [float(random.Random(str(text[: at + 1])).randrange(1 << 20)) for at in range(len(text))]
    return torch.tensor(values)[:, None, None] + torch.arange(3)


def holding(text: list[int]) -> RowCache:
    """A cache of two layers whose second row holds the text."""
    cache = RowCache()
    cache.place(torch.arange(len(text))[None], len(text), first=1)
    cache.reserve(2, len(text))
    for layer in range(2):
        keys = (states(text) + layer).transpose(0, 1)[None]
        cache.update(keys, -keys, layer)
    return cache


def held(cache: RowCache, count: int) -> list[torch.Tensor]:
    return [store[1, 1 : 1 + count] for layer in cache.row_layers for store in layer.stores]


def load(prefixes: PrefixCache, text: list[int], scope: str | None = "") -> int:
    """How many tokens of the text are known; checks that their keys and values are right."""
    cache = RowCache()
    cache.reserve(2, len(text))
    count = prefixes.load(cache, 1, scope, text)
    expected = [sign * (states(text[:count]) + layer) for layer in range(2) for sign in (1, -1)]
    assert all(map(torch.equal, held(cache, count), expected)) or not count
    return count


def shared(one: list[int], other: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def draw_text(draw: random.Random) -> list[int]:
    return [draw.randrange(3) for _ in range(draw.randint(1, 12))]


def test_longest_common_prefix_is_found() -> None:
    draw, prefixes, texts = random.Random(1), PrefixCache(), [[]]
    for _ in range(300):
        text = draw_text(draw)
        assert load(prefixes, text) == max(shared(text, other) for other in texts)
        prefixes.store(holding(text), 1, "", text)
        texts.append(text)
    prefixes_seen = {tuple(text[: at + 1]) for text in texts for at in range(len(text))}
    assert prefixes.bytes == TOKEN * len(prefixes_seen)  # none is stored twice


@pytest.mark.parametrize("tokens", [0, 1, 5, 13, 40])
def test_budget_is_kept_and_results_are_right(tokens: int) -> None:
    draw, prefixes, found = random.Random(tokens), PrefixCache(tokens * TOKEN + 1), 0
    for _ in range(300):
        text = draw_text(draw)
        found += load(prefixes, text)
        prefixes.store(holding(text), 1, "", text)
        assert prefixes.bytes <= prefixes.budget
        assert load(prefixes, text) == min(tokens, len(text))
    assert bool(found) == bool(tokens)
    prefixes.clear()
    assert prefixes.bytes == load(prefixes, text) == 0


def test_least_recently_used_is_dropped_first() -> None:
    prefixes, texts = PrefixCache(6 * TOKEN), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    for text in texts[:2]:
        prefixes.store(holding(text), 1, "", text)
    assert load(prefixes, texts[0]) == 3
    prefixes.store(holding(texts[2]), 1, "", texts[2])
    assert [load(prefixes, text) for text in texts] == [3, 0, 3]


def test_scopes_are_separate() -> None:
    prefixes, text = PrefixCache(), [1, 2, 3]
    prefixes.store(holding(text), 1, "a", text)
    prefixes.store(holding(text), 1, None, text)
    assert [load(prefixes, text, scope) for scope in ("a", "b", "", None)] == [3, 0, 0, 0]
    prefixes.store(holding(text), 1, "b", text)
    assert load(prefixes, text, "b") == 3 and prefixes.bytes == 6 * TOKEN


@contextmanager
def forwarded(model: Any) -> Iterator[list[int]]:
    """The number of tokens in each forward of the model, padding included."""
    counts: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 97) for _ in range(length)]


@pytest.mark.parametrize("interval", [1, 8])
@pytest.mark.parametrize("window", ["sliding", "block"])
def test_next_turn_starts_where_the_last_one_ended(window: str, interval: int) -> None:
    model, first, more = a_model(), prompt(60), prompt(9, 1)
    decoder = JacobiDecoder(model, 4, window=window)
    decoder.sync_interval = interval
    (answer,) = decoder.generate([first], max_new_tokens=21)
    with forwarded(model) as counts:
        (result,) = decoder.generate([[*first, *answer.token_ids, *more]], max_new_tokens=5)
    assert result.reused == 60 + 21 - 1  # no forward has computed the last token
    assert counts[0] == 1 + 8 + decoder.width
    with forwarded(model) as counts:
        assert decoder.generate([first], max_new_tokens=21) == [answer]
    assert counts[0] == decoder.width


def test_batch_computes_a_common_prefix_once() -> None:
    model, start = a_model(), prompt(100)
    rests = [prompt(count, count) for count in (3, 9, 5)]
    decoder = JacobiDecoder(model, 4)
    with forwarded(model) as counts:
        results = decoder.generate([start + rest for rest in rests], max_new_tokens=1)
    assert counts == [100, 3 * (8 + 4)]
    assert sorted(result.reused for result in results) == [0, 100, 100]
    with forwarded(model) as counts:
        samples = decoder.generate([prompt(80, 5)] * 8, max_new_tokens=1, sampling=[Sampling(1.0, seed=n) for n in range(8)])
    assert counts == [79, 8 * 4] and sum(result.reused for result in samples) == 7 * 79


def test_new_prompt_among_known_ones_is_computed_alone() -> None:
    model, known = a_model(), prompt(100)
    decoder = JacobiDecoder(model, 4)
    decoder.generate([known], max_new_tokens=1)
    batch = [[*known, 5, 6], prompt(120, 1), [*known, 8]]
    with forwarded(model) as counts:
        results = decoder.generate(batch, max_new_tokens=9)
    assert counts[:2] == [119 - 1, 3 * (1 + 4)]
    assert [result.reused for result in results] == [100, 0, 100]
    assert results == JacobiDecoder(model, 4, prefix_cache=0).generate(batch, max_new_tokens=9)


def test_prompts_without_a_common_prefix() -> None:
    model = a_model()
    batch = [[at, *prompt(60 + at, at)] for at in range(1, 5)]
    with forwarded(model) as counts:
        JacobiDecoder(model, 4).generate(batch, max_new_tokens=9)
    with forwarded(model) as without:
        JacobiDecoder(model, 4, prefix_cache=0).generate(batch, max_new_tokens=9)
    assert counts == without


def test_off() -> None:
    model, decoder = a_model(), JacobiDecoder(a_model(), 4, prefix_cache=0)
    results = decoder.generate([prompt(50)] * 3, max_new_tokens=9) + decoder.generate([prompt(50)], max_new_tokens=9)
    assert {result.reused for result in results} == {0} and decoder.prefixes.bytes == 0
    with pytest.raises(UsageError, match="prefix_cache must be >= 0 bytes, got -1"):
        JacobiDecoder(model, 4, prefix_cache=-1)
    assert PREFIX_BYTES == DEFAULT_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_texts_equal_generate(kind: str) -> None:
    """Prefixes of every length, rows that join and leave, dropped texts. Runs a few of exactness.py's cases."""
    for number in (1, 3):
        first = draw_case(f"{kind} {number}", kind=kind)
        decoder, texts = reusing(first, number), []
        for name in range(3):
            case = follow(draw_case(f"{kind} {number} {name}", **first.setting), texts, f"{kind} {number} {name}")
            expected = case.expected()
            assert case.decode(decoder) == expected, case
            assert 0 < decoder.prefixes.bytes <= decoder.prefixes.budget == BUDGETS[number]
            texts += [[*request.prompt, *text] for request, text in zip(case.requests, expected)]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_only_keys_of_verify_tokens_are_stored(kind: str) -> None:
    """Keys computed with the adapter would change later texts."""
    model = a_model(kind)
    drafting = JacobiDecoder(model, 5, adapter=random_adapter(model), drafts=7)
    plain = JacobiDecoder(model, 1, prefix_cache=0)
    text = prompt(40)
    for _ in range(3):
        (result,), (expected,) = (decoder.generate([text], max_new_tokens=30) for decoder in (drafting, plain))
        assert result.token_ids == expected.token_ids
        text = [*text, *result.token_ids, *prompt(5, len(text))]
    assert result.reused > 100


def test_captured_steps() -> None:
    """The numbers of finished rows stay in the buffers; a new row with such a number is a different one."""
    model, draw = a_model(), random.Random(3)
    decoder, plain = JacobiDecoder(model, 3), JacobiDecoder(model, 3, prefix_cache=0)
    decoder.runner, decoder.sync_interval = CapturingRunner(decoder.step, lambda step: step), 8
    texts = [prompt(40, 9)]
    for _ in range(5):
        wanted = []
        for _ in range(7):
            text = draw.choice(texts)
            wanted.append(Request([*text[: draw.randint(1, len(text))], draw.randrange(1, 97)], draw.randint(1, 30)))
        wanted.append(Request(prompt(60), 60))
        found = dict(Queue(decoder, 3).run(wanted))
        assert found == dict(Queue(plain, 3).run(wanted))
        texts = [[*request.prompt, *found[number].token_ids][:120] for number, request in enumerate(wanted)]
    assert decoder.prefixes.bytes


def test_new_weights_and_copies_start_empty() -> None:
    model, text = a_model(), prompt(30)
    decoder = JacobiDecoder(model, 4)
    decoder.generate([text], max_new_tokens=3)
    assert copy.deepcopy(decoder).generate([text], max_new_tokens=3)[0].reused == 0
    assert decoder.generate([text], max_new_tokens=3)[0].reused == 29
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1.5)
    (result,) = decoder.generate([text], max_new_tokens=3)
    assert result.reused == 0 and [result] == JacobiDecoder(model, 4).generate([text], max_new_tokens=3)


@pytest.mark.skipif(not onednn.has_onednn(torch.float32), reason="no x86 CPU, or a torch without oneDNN")
def test_edit_that_bypasses_version_counters() -> None:
    model, text = a_model(), prompt(30)
    decoder = JacobiDecoder(model, 4)
    decoder.generate([text], max_new_tokens=3)
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    layer.weight.data.mul_(-1.5)
    assert decoder.generate([text], max_new_tokens=3) == JacobiDecoder(model, 4).generate([text], max_new_tokens=3)


def test_out_of_memory_clears_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(JacobiDecoder(a_model(), 4), 2)
    queue.decoder.generate([prompt(30)], max_new_tokens=3)
    assert queue.decoder.prefixes.bytes and queue.shrink(torch.OutOfMemoryError("no more"))
    assert queue.decoder.prefixes.bytes == 0


def test_sampled_text_of_a_known_prompt_is_the_same() -> None:
    model, text = a_model(), prompt(50)
    samplings = [GREEDY, *(Sampling(0.9, top_p=0.95, seed=seed) for seed in range(4))]
    decoder = JacobiDecoder(model, 4)
    expected = JacobiDecoder(model, 4, prefix_cache=0).generate([text] * 5, max_new_tokens=12, sampling=samplings)
    for _ in range(2):
        assert decoder.generate([text] * 5, max_new_tokens=12, sampling=samplings) == expected
