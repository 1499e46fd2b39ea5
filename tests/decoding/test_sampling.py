"""Sampling is exact: it has the distribution of sampling token by token, and the window never changes the text."""

import math
import random

import pytest
import torch
from tiny import KINDS, tiny_model
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cllm.decoding import GREEDY, JacobiDecoder, Sampling
from cllm.decoding.noise import gumbel_noise
from cllm.decoding.sampling import Chooser, penalise, per_prompt, seen
from cllm.errors import UsageError

SAMPLES, TOGETHER = 20_000, 2_000
PROMPT = [1, 2, 4]
CASES_PER_KIND = 6
pytestmark = pytest.mark.usefixtures("one_thread")


def processors(sampling: Sampling) -> LogitsProcessorList:
    """The processors that ``generate(do_sample=True)`` would use, in its order."""
    steps = [
        (sampling.repetition_penalty != 1, RepetitionPenaltyLogitsProcessor, sampling.repetition_penalty),
        (True, TemperatureLogitsWarper, float(sampling.temperature)),
        (sampling.top_k, TopKLogitsWarper, sampling.top_k),
        (sampling.top_p < 1, TopPLogitsWarper, sampling.top_p),
        (sampling.min_p, MinPLogitsWarper, sampling.min_p),
    ]
    return LogitsProcessorList([make(value) for wanted, make, value in steps if wanted])


# ------------------------------------------------------------- the distribution


def exact_distribution(model: torch.nn.Module, prompt: list[int], length: int, sampling: Sampling) -> torch.Tensor:
    """The probability of every text of ``length`` tokens, in lexicographic order, from plain forwards."""
    texts, chances = torch.tensor([prompt]), torch.ones(1, dtype=torch.double)
    for _ in range(length):
        with torch.inference_mode():
            logits = model(texts).logits[:, -1].float()
        following = processors(sampling)(texts, logits).double().softmax(dim=-1)
        V = following.shape[1]
        chances = (chances[:, None] * following).flatten()
        texts = torch.cat([texts.repeat_interleave(V, 0), torch.arange(V).repeat(len(texts))[:, None]], dim=1)
    return chances


def p_value(observed: torch.Tensor, chances: torch.Tensor) -> float:
    """Pearson's chi-square test; rare outcomes are pooled, impossible ones must not occur."""
    assert not observed[chances == 0].any()
    expected = chances * observed.sum()
    rare = expected < 10
    cells = [torch.stack([observed, expected])[:, ~rare]]
    if expected[rare].sum() >= 1:
        cells.append(torch.stack([observed[rare].sum(), expected[rare].sum()])[:, None])
    seen_E, expected_E = torch.cat(cells, dim=1)
    statistic = ((seen_E - expected_E) ** 2 / expected_E).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen_E) - 1) / 2).double(), statistic / 2))


WINDOWS = [(1, "sliding"), (4, "sliding"), (3, "block")]
OPTIONS = [
    {"temperature": 0.6},
    {"temperature": 1.8, "top_k": 4},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.2, "min_p": 0.15},
    {"temperature": 1.0, "repetition_penalty": 1.6},
    {"temperature": 1.4, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "window"),
    [({"temperature": 1.0}, window) for window in WINDOWS] + [(options, WINDOWS[at % 3]) for at, options in enumerate(OPTIONS, 1)],
)
def test_samples_have_the_exact_distribution(options, window):
    """20,000 texts of three tokens, against the probabilities of all 343."""
    model = tiny_model(vocab_size=7, eos_token_id=None, num_hidden_layers=1, num_key_value_heads=1)
    decoder, places = JacobiDecoder(model, window[0], window=window[1]), torch.tensor([49, 7, 1])
    counts = torch.zeros(343, dtype=torch.double)
    for first in range(0, SAMPLES, TOGETHER):
        samplings = [Sampling(**options, seed=seed) for seed in range(first, first + TOGETHER)]
        results = decoder.generate([PROMPT] * TOGETHER, max_new_tokens=3, sampling=samplings)
        texts = torch.tensor([result.token_ids for result in results])
        counts += torch.bincount((texts * places).sum(dim=1), minlength=343)
    chances = exact_distribution(model, PROMPT, 3, Sampling(**options))
    assert chances.max() < 0.5  # no text is almost certain
    assert p_value(counts, chances) > 1e-4


def test_chi_square_test_can_fail():
    chances = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    assert p_value(chances * SAMPLES, chances) == 1.0
    assert p_value((chances + torch.tensor([0.015, -0.015, 0.0])) * SAMPLES, chances) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 0.8},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
)
def test_filters_equal_those_of_transformers(options):
    """Each row is in a batch with rows that use every other filter."""
    B, W, V = 6, 4, 60
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, W, V, generator=generator)
    text = torch.randint(0, V, (B, 9), generator=generator)
    positions = torch.arange(5, 9).expand(B, W)
    others = [Sampling(**other) for other in OPTIONS]
    sampling = Sampling(**{"temperature": 1.0} | options)
    for row in range(B):
        samplings = [*others[:row], sampling, *others[row + 1 :]]
        columns = torch.tensor([s.options() for s in samplings])
        ours = Chooser(samplings).warp(penalise(logits, seen(text, positions, V), columns[:, 4]), columns)
        for place in range(W):
            theirs = processors(sampling)(text[row : row + 1, : 6 + place], logits[row, place : place + 1])
            torch.testing.assert_close(ours[row, place], theirs[0], rtol=0, atol=0)


def test_equal_scores_stay_or_go_together():
    logits = torch.tensor([[[1.0, 2.0, 2.0, 0.0, 2.0]]])
    for options in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}):
        sampling = Sampling(temperature=1.0, **options)
        kept = Chooser([sampling]).warp(logits, torch.tensor([sampling.options()])).isfinite()
        assert kept.tolist() == [[[False, True, True, False, True]]], options


def test_penalty_ignores_tokens_outside_the_logits():
    found = seen(torch.tensor([[3, 9, 1, 0]]), torch.tensor([[1, 2]]), 4)
    assert found.tolist() == [[[False, False, False, True], [False, True, False, True]]]


# ------------------------------------------------------------- the text


def random_sampling(draw: random.Random) -> Sampling:
    """Random options, often the defaults."""
    return Sampling(
        temperature=draw.choice([0.0, 0.5, 1.0, 1.5]),
        top_k=draw.choice([0, 0, 3, 20]),
        top_p=draw.choice([1.0, 1.0, 0.5, 0.9]),
        min_p=draw.choice([0.0, 0.0, 0.1]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.3, 2.0, 0.7]),
        seed=draw.randrange(1 << 63),
    )


def other_guesses(text_BS, known_B, positions_BK, seed_B):
    return (7 * positions_BK + 3) % 97


def texts(decoder: JacobiDecoder, rows: list[tuple[list[int], Sampling]]) -> list[list[int]]:
    prompts, samplings = zip(*rows)
    return [result.token_ids for result in decoder.generate(prompts, max_new_tokens=24, sampling=samplings)]


@pytest.mark.parametrize("kind", KINDS)
def test_window_batch_and_guesses_never_change_sampled_text(kind):
    """The same samples at widths 1 to 16, alone and in ragged batches of 5, with both windows and other guesses."""
    for case in range(CASES_PER_KIND):
        draw = random.Random(f"{kind} {case}")
        model = tiny_model(kind, seed=case, vocab_size=97, eos_token_id=None)
        rows = [([draw.randrange(1, 97) for _ in range(draw.randint(1, 20))], random_sampling(draw)) for _ in range(5)]
        eos = [draw.randrange(97), draw.randrange(97)]
        expected = texts(JacobiDecoder(model, 1, eos_token_ids=eos), rows)
        for decoder in (
            JacobiDecoder(model, 4, eos_token_ids=eos),
            JacobiDecoder(model, 16, eos_token_ids=eos, seed=case + 1),
            JacobiDecoder(model, draw.choice([3, 16]), eos_token_ids=eos, window="block", guess=other_guesses),
        ):
            assert texts(decoder, rows) == expected, case
        alone = draw.randrange(5)
        assert texts(decoder, rows[alone : alone + 1]) == expected[alone : alone + 1], case


def test_sampling_equals_transformers_token_by_token():
    """The reference: a plain forward per token, transformers' processors, and the noise of the position."""
    model, prompt = tiny_model("qwen3", vocab_size=97, eos_token_id=None), [5, 6, 7]
    sampling = Sampling(temperature=1.2, top_k=40, top_p=0.95, repetition_penalty=1.3, seed=11)
    text = list(prompt)
    for _ in range(30):
        with torch.inference_mode():
            scores = processors(sampling)(torch.tensor([text]), model(torch.tensor([text])).logits[:, -1])
        noise = gumbel_noise(torch.tensor([11]), torch.tensor([[len(text)]]), 97)[0]
        text.append(int((scores + noise).argmax()))
    (result,) = JacobiDecoder(model, 8).generate([prompt], max_new_tokens=30, sampling=sampling)
    assert result.token_ids == text[len(prompt) :]


def test_greedy_rows_in_a_sampled_batch_stay_greedy():
    model = tiny_model(vocab_size=97, eos_token_id=None)
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    decoder = JacobiDecoder(model, 6)
    greedy = [result.token_ids for result in decoder.generate(prompts, max_new_tokens=30)]
    drawn = Sampling(temperature=1.0, top_k=5, top_p=0.8, min_p=0.01, repetition_penalty=1.5)
    samplings = [GREEDY, drawn, Sampling(top_k=1, top_p=0.1, seed=3), drawn]
    mixed = [result.token_ids for result in decoder.generate(prompts, max_new_tokens=30, sampling=samplings)]
    assert mixed[::2] == greedy[::2]
    assert mixed[1] != greedy[1] and mixed[3] != greedy[3]


def test_penalty_applies_to_greedy_decoding():
    model, prompt = tiny_model(vocab_size=97, eos_token_id=None), [1, 2, 3]
    options = {"do_sample": False, "repetition_penalty": 1.4, "pad_token_id": 0}
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, **options)
    (result,) = JacobiDecoder(model, 8).generate([prompt], max_new_tokens=40, sampling=Sampling(repetition_penalty=1.4))
    assert result.token_ids == expected[0, 3:].tolist()


def test_plain_greedy_decoding_skips_all_filters(monkeypatch):
    for step in ("seen", "penalise", "gumbel_noise", "Chooser.warp"):
        monkeypatch.setattr(f"cllm.decoding.sampling.{step}", None)
    model = tiny_model(vocab_size=97, eos_token_id=None)
    (result,) = JacobiDecoder(model, 4).generate([[1]], max_new_tokens=8, sampling=Sampling(top_k=3, top_p=0.2, seed=9))
    assert len(result.token_ids) == 8


def test_seed_determines_the_text():
    decoder = JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None), 4)
    samplings = [Sampling(temperature=1.5, seed=seed) for seed in (0, 1, 2, 1)]
    texts = [r.token_ids for r in decoder.generate([[5]] * 4, max_new_tokens=20, sampling=samplings)]
    assert texts[1] == texts[3] and len({tuple(text) for text in texts}) == 3


def test_large_batches_are_chunked(monkeypatch):
    decoder = JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None), 4)
    samplings = [Sampling(temperature=1.0, repetition_penalty=1.2, seed=seed) for seed in range(7)]
    whole = decoder.generate([[5], [6, 7]] + [[8]] * 5, max_new_tokens=12, sampling=samplings)
    for logits in (1, 3 * 4 * 97):
        monkeypatch.setattr("cllm.decoding.sampling.CHUNK", logits)
        assert decoder.generate([[5], [6, 7]] + [[8]] * 5, max_new_tokens=12, sampling=samplings) == whole


# ------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 (greedy) or between 1e-05 and 100000, got -1.0"),
        ({"temperature": 1e-9}, "temperature must be 0 (greedy) or between 1e-05 and 100000, got 1e-09"),
        ({"temperature": math.nan}, "temperature must be 0 (greedy) or between 1e-05 and 100000, got nan"),
        ({"temperature": math.inf}, "temperature must be 0 (greedy) or between 1e-05 and 100000, got inf"),
        ({"temperature": 1e30}, "temperature must be 0 (greedy) or between 1e-05 and 100000, got 1e+30"),
        ({"top_k": -1}, "top_k must be between 0 (off) and 2147483647, got -1"),
        ({"top_k": 1 << 31}, "top_k must be between 0 (off) and 2147483647, got 2147483648"),
        ({"top_k": 10**400}, f"top_k must be between 0 (off) and 2147483647, got {10**400}"),
        ({"top_p": -0.1}, "top_p must be between 0 and 1, got -0.1"),
        ({"top_p": 1.1}, "top_p must be between 0 and 1, got 1.1"),
        ({"top_p": math.nan}, "top_p must be between 0 and 1, got nan"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1, got -0.1"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1, got 1.5"),
        ({"min_p": math.nan}, "min_p must be between 0 and 1, got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between 1e-05 and 100000, got 0.0"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be between 1e-05 and 100000, got 1e+39"),
        ({"seed": -(1 << 63) - 1}, f"seed must be between -2**63 and 2**63 - 1, got {-(1 << 63) - 1}"),
        ({"seed": 1 << 63}, f"seed must be between -2**63 and 2**63 - 1, got {1 << 63}"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(UsageError) as error:
        Sampling(**options)
    assert str(error.value) == message


EDGES = [
    {"temperature": 1e-5},
    {"temperature": 1e5},
    {"temperature": 1.0, "top_k": (1 << 31) - 1},
    {"temperature": 1.0, "top_p": 5e-324},
    {"temperature": 1.0, "min_p": 5e-324},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1e-5, "repetition_penalty": 1e5},
    {"temperature": 1e5, "repetition_penalty": 1e-5},
    {"temperature": 1.0, "seed": -(1 << 63)},
    {"temperature": 1.0, "seed": (1 << 63) - 1},
]


@pytest.mark.parametrize("options", EDGES, ids=str)
def test_all_valid_options_can_be_decoded(options):
    """Next to a greedy row, which stays unchanged; and a wide window gives the same samples as one token at a time."""
    model = tiny_model(vocab_size=97, eos_token_id=None)
    samplings = [GREEDY, Sampling(**options)]
    prompts = [[1, 2, 3], [4, 5]]
    texts = [
        [row.token_ids for row in JacobiDecoder(model, width).generate(prompts, max_new_tokens=12, sampling=samplings)] for width in (1, 6)
    ]
    assert texts[0] == texts[1] and all(0 <= token < 97 for token in texts[0][1])
    assert texts[0][0] == JacobiDecoder(model, 6).generate(prompts[:1], max_new_tokens=12)[0].token_ids


def test_top_p_0_takes_the_most_likely_token():
    """Even for a nearly uniform distribution, where sums of probabilities are rounded."""
    model = tiny_model(vocab_size=97, eos_token_id=None)
    for temperature in (0.5, 1e5):
        sampling = Sampling(temperature, top_p=0.0, seed=3, repetition_penalty=1.3)
        decoder = JacobiDecoder(model, 4)
        (drawn,) = decoder.generate([[1, 2]], max_new_tokens=20, sampling=sampling)
        (greedy,) = decoder.generate([[1, 2]], max_new_tokens=20, sampling=Sampling(repetition_penalty=1.3))
        assert drawn.token_ids == greedy.token_ids


def test_negative_seeds_give_different_texts():
    model = tiny_model(vocab_size=97, eos_token_id=None)
    samplings = [Sampling(1.5, seed=seed) for seed in (-1, -2, -(1 << 63), 1, 2)]
    texts = JacobiDecoder(model, 4).generate([[1, 2]] * 5, max_new_tokens=20, sampling=samplings)
    assert len({tuple(text.token_ids) for text in texts}) == 5


def test_label_lists_changed_options():
    assert Sampling(0.8, top_p=0.0).label == "greedy"
    assert GREEDY.label == Sampling(top_p=0.5, top_k=3, seed=7).label == "greedy"
    assert Sampling(repetition_penalty=1.2).label == "greedy, repetition_penalty 1.2"
    assert Sampling(0.8, top_k=40, top_p=0.95, seed=7).label == "temperature 0.8, top_k 40, top_p 0.95"


def test_one_sampling_per_prompt():
    assert per_prompt(GREEDY, 3) == [GREEDY] * 3
    with pytest.raises(UsageError, match="one for all prompts or one for each of the 2, got 3"):
        JacobiDecoder(tiny_model(), 4).generate([[1], [2]], max_new_tokens=4, sampling=[GREEDY] * 3)


# ------------------------------------------------------------- the noise


def test_noise_is_gumbel_noise():
    """Mean and variance of a million values, and the histogram of the underlying uniform numbers in 20 bins."""
    noise = gumbel_noise(torch.arange(20), torch.arange(50).expand(20, 50), 1000).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 5 * math.pi / 6**0.5 / 1000
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    uniform = (-(-noise).exp()).exp()
    counts = torch.histc(uniform, bins=20, min=0, max=1)
    assert p_value(counts, torch.full((20,), 0.05, dtype=torch.double)) > 1e-4


def test_neighbouring_noise_is_independent():
    """For neighbouring seeds, positions and tokens: no correlation, and pairs fill the square evenly."""
    noise = gumbel_noise(torch.arange(100), torch.arange(100).expand(100, 100), 100).double()
    uniform = (-(-noise).exp()).exp()
    for shift in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, -1, 0), (0, 1, 1), (0, 1, -1), (1, 0, -1), (0, 2, 0)):
        other = uniform.roll(shift, dims=(0, 1, 2))
        correlation = torch.corrcoef(torch.stack([uniform.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.005, shift  # five standard deviations
        pairs = (uniform * 8).long().clamp(max=7) * 8 + (other * 8).long().clamp(max=7)
        assert p_value(torch.bincount(pairs.flatten()).double(), torch.full((64,), 1 / 64).double()) > 1e-4, shift


def test_streams_are_distinct():
    """For seeds that differ in any one bit, and for a text and its continuation."""
    seeds = torch.tensor([0, *(1 << bit for bit in range(63)), (1 << 63) - 1])
    noise = gumbel_noise(seeds, torch.arange(4).expand(65, 4), 3).reshape(-1, 3)
    assert len(noise.unique(dim=0)) == 65 * 4


def test_extreme_values_are_finite(monkeypatch):
    for word in (0, -1):
        monkeypatch.setattr("cllm.decoding.noise._mix", lambda x, word=word: torch.full_like(x, word))
        assert gumbel_noise(torch.tensor([0]), torch.tensor([[1]]), 2).isfinite().all()
