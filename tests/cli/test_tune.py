"""The tune command on a tiny model: what it measures, what it picks, and where that is found again."""

import json
from pathlib import Path

import pytest
from commands import question_rows, refused, write_rows
from tiny import random_adapter, save_tiny_checkpoint, tiny_model
from transformers import AutoConfig

from cllm.adapter import attach
from cllm.cli import tune
from cllm.decoding import JacobiDecoder
from cllm.errors import UsageError
from cllm.evaluation.choice import CANDIDATES, Choice, Setting, _race, _together, fastest, measure_choices
from cllm.evaluation.method import Response
from cllm.evaluation.speed import Run
from cllm.models import default_drafts, default_guess, default_width, read_record


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    model = save_tiny_checkpoint(tmp_path / "m")
    data = write_rows(tmp_path / "test.jsonl", question_rows(3))
    given = ["--model", model, "--task", "gsm8k", "--filename", data, "--output", tmp_path / "tune.json"]
    return [*map(str, given), "--device", "cpu", "--widths", "1", "4", "--max_new_seq_len", "16"]


def test_the_choice_is_found_again(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tune.main([*words, "--batch_size", "1", "2", "--guess", "pool", "filler", "--save"])
    report = json.loads((tmp_path / "tune.json").read_text())
    found = [(c["batch_size"], c["width"], c["guess"]) for c in report["choices"]]
    assert found == [(size, *pair) for size in (1, 2) for pair in ((1, "pool"), (4, "pool"), (4, "filler"))]
    best, record = report["best"]["1"], read_record(AutoConfig.from_pretrained(tmp_path / "m"))
    assert (default_width(record), default_guess(record)) == (best["width"], best["guess"])
    printed = capsys.readouterr().out
    assert f"Width {best['width']} and guess {best['guess']} stored" in printed and printed.count(" *\n") == 2


def test_auto_measures_all_candidates(words: list[str], tmp_path: Path) -> None:
    tune.main([*words, "--widths", "4"])
    choices = json.loads((tmp_path / "tune.json").read_text())["choices"]
    assert tuple(c["guess"] for c in choices) == CANDIDATES


def test_gain_and_cost_are_those_of_the_decoder() -> None:
    model, prompts = tiny_model(), [[5, 6, 7], [8] * 9, [4, 4]]
    (one,) = measure_choices(model, prompts, [1], ["context", "pool"], [2], max_new_tokens=12)
    four, pool = measure_choices(model, prompts, [4], ["context", "pool"], [2], max_new_tokens=12)
    assert (one.tokens_per_forward, one.guess) == (1.0, "context")
    for choice in (four, pool):  # three batches of two: every prompt twice
        results = JacobiDecoder(model, 4, guess=choice.guess).generate(prompts, max_new_tokens=12)
        assert choice.tokens_per_forward == sum(len(r.token_ids) for r in results) / sum(r.forwards for r in results)
    assert 0 < one.seconds < 2 * 12 / one.tokens_per_second  # 12 forwards give 24 tokens; the prefill is no iteration


def test_whole_texts_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations that grow dearer towards the end count in full; the first ones alone would deceive."""
    clock, engine = [0.0], JacobiDecoder.generate
    spent = {1: 1.0, 4: 3.0}

    def generate(self, prompts, **options):
        results = engine(self, prompts, **options)
        clock[0] += spent[self.block_size]
        return results

    monkeypatch.setattr(JacobiDecoder, "generate", generate)
    monkeypatch.setattr("cllm.evaluation.speed.time.perf_counter", lambda: clock[0])
    one, four = measure_choices(tiny_model(), [[5, 6, 7], [8] * 9], [1, 4], ["context"], [1], max_new_tokens=12)
    assert (one.tokens_per_second, four.tokens_per_second) == (12.0, 4.0)


def test_the_fastest_is_that_of_its_batch_size() -> None:
    slow, quick = Choice(1, 0, "context", 1, 0.1, 1.0, 10.0, 8), Choice(8, 0, "pool", 1, 0.12, 2.0, 16.0, 8)
    other, out = Choice(4, 0, "context", 2, 0.01, 9.0, 900.0, 8), Choice(8, 0, "context", 1, 0.1, 2.0, 20.0, 2)
    assert fastest([slow, quick, other, out], 1) is quick and fastest([slow, quick, other], 2) is other


def test_the_slow_drop_out_and_the_fast_decode_everything() -> None:
    """Twelve pairs, of which the wider are the faster; each round is about prompts that no round was about before."""
    rounds = []

    def run(racing, batches):
        rounds.append(([width for width, _ in racing], batches))
        for width, _ in racing:
            response = Response([7] * width, forwards=1)
            yield [Run(1.0, 0.5, [response]) for _ in batches]

    pairs = [(width, "pool") for width in range(1, 13)]
    runs = _race(pairs, [[[n]] for n in range(16)], run)
    assert [widths for widths, _ in rounds] == [[*range(first, 13)] for first in (1, 7, 10, 10)]
    assert [ids for _, batches in rounds for ((ids,),) in batches] == [*range(16)]
    assert [len(runs[pair]) for pair in pairs] == [2] * 6 + [4] * 3 + [16] * 3


def test_few_batches_are_enough() -> None:
    pairs = [(width, "pool") for width in range(1, 7)]
    one = Run(1.0, 0.5, [Response([7], forwards=1)])
    runs = _race(pairs, [[[1]], [[2]], [[3]]], lambda racing, batches: [[one] * len(batches) for _ in racing])
    assert sorted(map(len, runs.values())) == [1, 1, 1, 3, 3, 3]


def test_draft_tokens_of_a_model_with_an_adapter() -> None:
    model = tiny_model(eos_token_id=None)
    attach(model, random_adapter(model))
    measured = measure_choices(model, [[5, 6, 7]], [1, 4], ["context"], [1], max_new_tokens=12, drafts=[2, 3, 8])
    assert [(m.width, m.drafts) for m in measured] == [(1, 0), (4, 3), (4, 8)]
    measured = measure_choices(model, [[5, 6, 7]], [1, 2, 4], ["context"], [1], max_new_tokens=12)
    assert [(m.width, m.drafts) for m in measured] == [(1, 0), (2, 2), (4, 6)]
    record = {"decoding_width": 4, "decoding_drafts": 8}
    assert [default_drafts(record, width) for width in (4, 6, 1)] == [8, 5, 0]


def test_what_is_trained_counts_where_nothing_was_measured() -> None:
    assert [default_width(r) for r in ({}, {"block_size": 8}, {"block_size": 8, "decoding_width": 4})] == [16, 8, 4]
    records = {}, {"block_size": 8}, {"guess": "uniform"}, {"guess": "uniform", "decoding_guess": "pool"}
    assert [default_guess(record) for record in records] == ["context", "context", "uniform", "pool"]


def test_no_room_to_measure() -> None:
    with pytest.raises(UsageError, match="leave no room"):
        measure_choices(tiny_model(), [[1] * 255], [4], ["context"], [1], max_new_tokens=4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--widths", "0"], "must be an integer >= 1, got '0'"),
        (["--widths", "300"], "got 300"),
        (["--guess", "lucky"], "unknown guess 'lucky'"),
        (["--filename", "none.jsonl"], "cannot read none.jsonl"),
        (["--model", "someone/model", "--save"], "--save needs a local checkpoint, got 'someone/model'"),
    ],
)
def test_bad_input(words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert message in refused(capsys, tune.main, *words, *more)


def test_on_a_gpu_the_choices_of_one_width_are_in_memory_at_a_time():
    settings = [Setting(1, 0, "context"), Setting(4, 0, "context"), Setting(4, 0, "pool")]
    assert _together(settings, "cpu") == [settings] and _together(settings, "cuda") == [settings[:1], settings[1:]]
