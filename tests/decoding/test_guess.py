"""Strategies for fresh guesses: what they find, what they remember, and that they never change the output."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import KINDS, Successor, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from cllm.decoding import GuessStrategy, JacobiDecoder, PartialWindow, make_guess
from cllm.decoding.guess import STRATEGIES
from cllm.decoding.ngram_pool import SLOTS, slot_of
from cllm.decoding.prompt_lookup import HINTED, LONGEST, TRUSTED
from cllm.errors import UsageError
from cllm.trajectory.hygiene import cut_at_eos

COMBINATIONS = ("pool+prompt_lookup+context", "prompt_lookup+pool+filler", "pool+filler")
NAMES = (*STRATEGIES, *COMBINATIONS)
STALE = 999  # marks positions that no strategy may read
CASES_PER_NAME = 12

tokens = st.integers(0, 3)


def partial_of(text: list[int], kept: list[int], width: int, firm: int = 1) -> PartialWindow:
    """One row: ``text`` is verified, its last token starts the window, ``kept`` guesses follow, and the rest is stale."""
    return PartialWindow(
        text_BS=torch.tensor([text + [STALE] * 2 * width]),
        start_B=torch.tensor([len(text) - 1]),
        window_BW=torch.tensor([text[-1:] + kept + [STALE] * (width - 1 - len(kept))]),
        firm_B=torch.tensor([firm]),
        filled_B=torch.tensor([1 + len(kept)]),
        useful_B=torch.tensor([1]),
        seed_B=torch.tensor([0]),
        vocabulary=97,
    )


def memory_of(guess: GuessStrategy, rows: int = 1) -> torch.Tensor:
    return torch.full((rows, guess.memory_size), -1)


@st.composite
def partials(draw) -> PartialWindow:
    width = draw(st.integers(1, 9))
    text = draw(st.lists(tokens, min_size=1, max_size=30))
    kept = draw(st.lists(tokens, max_size=width - 1))
    firm = draw(st.integers(1, 1 + len(kept)))
    return replace(partial_of(text, kept, width, firm), narrows=draw(st.booleans()))


def written(partial: PartialWindow) -> list[int]:
    return partial.window_BW[0, : partial.filled_B[0]].tolist()


# ------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("name", NAMES)
def test_no_strategy_changes_the_output(name):
    """All kinds of models, widths 1 to 17, ragged batches, both windows; EOS early, late, never."""
    for case in range(CASES_PER_NAME):
        draw = random.Random(f"{name} {case}")
        model = tiny_model(KINDS[case % len(KINDS)], seed=case, eos_token_id=None)
        words = draw.randint(2, 97)  # if few, the text repeats itself
        prompts = [[draw.randrange(words) for _ in range(draw.randint(1, 30))] for _ in range(draw.randint(1, 4))]
        free = [r.token_ids for r in JacobiDecoder(model, 1).generate(prompts, max_new_tokens=30)]
        eos = draw.choice([[], free[0][:1], free[-1][-1:], free[0][15:16]])
        window = draw.choice(["sliding", "sliding", "block"])
        decoder = JacobiDecoder(model, draw.randint(1, 17), eos_token_ids=eos, window=window, guess=name)
        results = decoder.generate(prompts, max_new_tokens=30)
        assert [r.token_ids for r in results] == [cut_at_eos(ids, set(eos)) for ids in free], case
        for result in results:
            assert sum(result.accepted) == len(result.token_ids)
            assert result.stationary <= result.fast_forwarded


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_the_batch(name):
    model = tiny_model("qwen3", seed=5, eos_token_id=None)
    decoder = JacobiDecoder(model, 9, guess=name)
    prompts = [[1], [2, 3, 4, 5, 6, 7, 2, 3], [10] * 25]
    alone = [decoder.generate([prompt], max_new_tokens=30)[0] for prompt in prompts]
    together = decoder.generate(prompts, max_new_tokens=30)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert together == alone or decoder.runner.narrows  # a forward widened for another row may gain more


def forwards(name: str, prompt: list[int], new_tokens: int = 160) -> int:
    (result,) = JacobiDecoder(Successor(7, 99), 16, guess=name).generate([prompt], max_new_tokens=new_tokens)
    assert result.token_ids == [(prompt[-1] + 1 + i) % 7 for i in range(new_tokens)]
    return result.forwards


def test_repeated_text_is_guessed_in_whole_windows():
    prompt = [*range(7), *range(7)]
    assert forwards("prompt_lookup", prompt) == 160 // 16
    assert forwards("context", prompt) > 40
    assert forwards("pool", prompt) <= 160 // 16 + 7
    assert forwards("pool+prompt_lookup", [3]) <= 160 // 16 + 8  # a prompt without a hint


def widths(guess: str | GuessStrategy, prompts: list[list[int]], new_tokens: int, width: int = 8, **options) -> list[int]:
    """The window width of each forward of a model that repeatedly counts to 30."""
    decoder = JacobiDecoder(Successor(30, 99), width, guess=guess, **options)
    return [i.window_BW.shape[1] for i in decoder.iterate(prompts, max_new_tokens=new_tokens)]


def test_forwards_are_as_wide_as_worthwhile() -> None:
    """On a CPU: one token without a match, some after a one-token match, the window after two, for the row that needs most."""
    assert widths("prompt_lookup", [[0]], 30 + 8 + 24, width=12) == [1] * 30 + [8] + [12] * 2  # 0 occurs again after 30 tokens
    assert widths("prompt_lookup", [[0], [3, 4, 8, 3, 4]], 8, width=12) == [12, 1, 1, 1, 8, 1, 1, 1]  # 3 4, and later 8
    assert widths("pool", [[0]], 31 + 16) == [1] * 31 + [8] * 2
    for whole in ("context", "filler", "prompt_lookup+context", "pool+filler", Spoiler()):
        assert set(widths(whole, [[0]], 12)) == {8}
    assert set(widths("prompt_lookup", [[0]], 12, window="block")) == {9}
    assert not JacobiDecoder(Successor(), 8, guess="prompt_lookup", compile="compile").runner.narrows


class Spoiler(GuessStrategy):
    """Replaces all replaceable guesses."""

    name, fills_all = "spoiler", True

    def fill(self, memory_BM, partial):
        window_BW = torch.where(partial.order_W < partial.firm_B[:, None], partial.window_BW, 98)
        return replace(partial, window_BW=window_BW)


def test_replaced_guesses_are_not_stationary():
    (result,) = JacobiDecoder(Successor(7, 99), 4, guess=Spoiler()).generate([[0]], max_new_tokens=9)
    assert (result.accepted, result.fast_forwarded, result.stationary) == ([1] * 9, 0, 0)


def test_block_mode_keeps_its_guesses():
    model = tiny_model(seed=3, eos_token_id=None)
    for name in NAMES:
        decoder = JacobiDecoder(model, 5, window="block", guess=name)
        iterations = list(decoder.iterate([[1, 2, 3, 1, 2]], max_new_tokens=20))
        for before, after in zip(iterations, iterations[1:]):
            if not before.emitted_B[0]:
                assert after.window_BW[0, 1:].tolist() == before.choices_BW[0, :-1].tolist()


# ------------------------------------------------------------------------------------------------------ every strategy


@pytest.mark.parametrize("name", NAMES)
@given(partial=partials(), choices=st.lists(tokens, min_size=9, max_size=9))
@settings(max_examples=60, deadline=None)
def test_firm_tokens_stay_and_nothing_stale_is_read(name, partial, choices):
    guess, width = make_guess(name), partial.window_BW.shape[1]
    memory = memory_of(guess)
    guess.learn(memory, partial.before_B, torch.tensor([choices[:width]]), torch.tensor([choices[-width:]]))
    filled = guess.fill(memory, partial)
    firm = int(partial.firm_B)
    assert filled.window_BW[0, :firm].tolist() == partial.window_BW[0, :firm].tolist()
    assert STALE not in filled.window_BW
    assert filled.filled_B.tolist() == [width]


@pytest.mark.parametrize("name", NAMES)
def test_strategies_do_not_synchronise(name):
    """Fake tensors have no values, so reading one, or a shape that depends on one, fails."""
    guess = make_guess(name)
    with FakeTensorMode():
        row_B = torch.ones(3, dtype=torch.long)
        window_BW = torch.ones(3, 8, dtype=torch.long)
        memory = memory_of(guess, rows=3)
        partial = PartialWindow(torch.ones(3, 50, dtype=torch.long), row_B, window_BW, row_B, row_B, row_B, row_B, 97)
        guess.learn(memory, row_B, window_BW, window_BW)
        filled = guess.fill(memory, partial)
    assert filled.window_BW.shape == (3, 8)
    assert memory.shape == (3, guess.memory_size)


# ------------------------------------------------------------------------------------------------------- prompt lookup


def looked_up(partial: PartialWindow) -> list[int]:
    """Prompt lookup in plain Python: the filled part of the window."""
    start, firm, filled = int(partial.start_B), int(partial.firm_B), int(partial.filled_B)
    text = partial.text_BS[0, :start].tolist()
    window, width = partial.window_BW[0].tolist(), partial.window_BW.shape[1]
    for here, shortest in ((firm, 1 if partial.narrows and firm == 1 else TRUSTED), (filled, 1)):
        known = text + window[:here]
        for size in range(LONGEST, shortest - 1, -1):
            for end in range(start, size - 1, -1):  # the match is known[end - size : end]; known[end] is verified
                if here < width and known[end - size : end] == known[-size:]:
                    while len(known) < start + width:
                        known.append(known[end])
                        end += 1
                    return known[start:]
    return window[:filled]


@given(partial=partials())
@settings(max_examples=500, deadline=None)
def test_prompt_lookup_equals_plain_python(partial):
    assert written(STRATEGIES["prompt_lookup"].fill(memory_of(STRATEGIES["prompt_lookup"]), partial)) == looked_up(partial)


def test_one_token_match_replaces_refined_guesses_that_are_not_worth_computing():
    guess = STRATEGIES["prompt_lookup"]
    for firm, kept, useful in ((1, [5, 5], 1 + HINTED), (2, [5, 5], 1)):
        partial = replace(partial_of([1, 4, 3, 9, 8, 6, 7, 3], kept, 10, firm), narrows=True)
        filled = guess.fill(memory_of(guess), partial)
        assert filled.useful_B.tolist() == [useful]
        assert (written(filled)[:4] == [3, 9, 8, 6]) == (firm == 1)
        assert int(filled.firm_B) == firm  # so that the pool may still replace them


@pytest.mark.parametrize(
    ("text", "kept", "expected"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], [], [3, 9, 8, 1, 2]),
        ([1, 2, 3, 9, 8, 1, 2, 3], [5, 5], [3, 9, 8, 1, 2]),  # a match of verified text replaces guesses
        ([1, 4, 3, 9, 8, 6, 7, 3], [4, 3], [3, 4, 3, 9, 8]),  # a match of one token does not; 4 3 matches after them
        ([5, 1, 2, 6, 1, 2], [], [2, 6, 1, 2, 6]),  # the copy runs into itself
        ([3, 5, 7, 4, 5, 1, 3, 5], [], [5, 7, 4, 5, 1]),  # a longer match before a later one
        ([5, 1, 7, 5, 2, 8, 5], [], [5, 2, 8, 5, 2]),  # the later of two
        ([1, 2, 3], [], [3]),
        ([1], [], [1]),
    ],
)
def test_prompt_lookup_examples(text, kept, expected):
    guess = STRATEGIES["prompt_lookup"]
    assert written(guess.fill(memory_of(guess), partial_of(text, kept, 5))) == expected


# ---------------------------------------------------------------------------------------------------------------- pool


def test_pool_recalls_rejected_choices():
    guess = STRATEGIES["pool"]
    memory = memory_of(guess)
    # In the window 1 5 6 7 after 0 the model chose 4 after 1, so 5 is wrong, and the choices 6 7 8 after it are rejected.
    guess.learn(memory, torch.tensor([0]), torch.tensor([[1, 5, 6, 7]]), torch.tensor([[4, 6, 7, 8]]))
    assert written(guess.fill(memory, partial_of([3, 5], [], 5))) == [5, 6, 7, 8]
    assert written(guess.fill(memory, partial_of([3, 9], [2, 6], 5))) == [9, 2, 6, 7, 8]
    assert written(guess.fill(memory, partial_of([5, 6], [2, 2], 5))) == [6, 7, 8]


def test_newest_entry_wins():
    guess = STRATEGIES["pool"]
    memory = memory_of(guess)
    guess.learn(memory, torch.tensor([0]), torch.tensor([[1, 2, 1, 2]]), torch.tensor([[3, 4, 5, 6]]))
    assert written(guess.fill(memory, partial_of([1, 2], [], 2))) == [2, 6]
    guess.learn(memory, torch.tensor([1]), torch.tensor([[2]]), torch.tensor([[7]]))
    assert written(guess.fill(memory, partial_of([1, 2], [], 2))) == [2, 7]


windows = st.integers(1, 6).flatmap(lambda w: st.tuples(*[st.lists(tokens, min_size=w, max_size=w)] * 2))


@given(seen=st.lists(st.tuples(tokens, windows), max_size=5), partial=partials())
@settings(max_examples=300, deadline=None)
def test_pool_equals_a_dictionary(seen, partial):
    guess = STRATEGIES["pool"]
    memory, newest = memory_of(guess), {}
    for before, (window, choices) in seen:
        guess.learn(memory, torch.tensor([before]), torch.tensor([window]), torch.tensor([choices]))
        pairs = list(zip([before, *window], window, choices))
        newest |= {(None, second): choice for _, second, choice in pairs}
        newest |= {(first, second): choice for first, second, choice in pairs}
    firm, filled, width = int(partial.firm_B), int(partial.filled_B), partial.window_BW.shape[1]
    line = [int(partial.before_B), *written(partial)]  # the window's position p is line[p + 1]
    for at in range(1, width):
        double, single = newest.get((line[at - 1], line[at])), newest.get((None, line[at]))
        if at < len(line) - 1:
            if at >= firm and double is not None:
                line[at + 1] = double
        elif double is not None or single is not None:
            line.append(single if double is None else double)
        else:
            break
    assert filled <= len(line) - 1
    assert written(guess.fill(memory, partial)) == line[1:]


def test_hash_spreads_and_memory_is_bounded():
    guess = STRATEGIES["pool"]
    slots = slot_of(torch.randint(0, 1 << 42, (1, 20_000), generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(slots[0], minlength=SLOTS)
    assert len(counts) == SLOTS and counts.max() < 20
    memory, draw = memory_of(guess), torch.Generator().manual_seed(0)
    for _ in range(300):
        window, choices = torch.randint(0, 1 << 20, (2, 1, 32), generator=draw)
        guess.learn(memory, window[:, 0], window, choices)
    assert memory.shape == (1, SLOTS + 1)
    assert (memory[:, :-1] >= 0).float().mean() > 0.9


# --------------------------------------------------------------------------------------------------------------- names


def test_valid_names():
    assert make_guess("pool+prompt_lookup").name == "pool+prompt_lookup"
    assert make_guess("pool+filler").name == "pool+filler"
    assert make_guess("context").name == JacobiDecoder(tiny_model(), 4).guess.name == "context"
    assert make_guess(STRATEGIES["pool"]).name == "pool"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poool", "unknown guess 'poool'; choose from context, uniform, filler, prompt_lookup, pool"),
        ("pool+", "unknown guess ''"),
        ("", "unknown guess ''"),
        ("context+pool", "'context\\+pool': context leaves nothing to the parts after it; put it last"),
    ],
)
def test_bad_names(text, message):
    with pytest.raises(UsageError, match=message):
        JacobiDecoder(tiny_model(), 4, guess=text)
