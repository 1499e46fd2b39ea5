"""The generate command on a tiny model: every prompt gets its reply once, whatever happens on the way."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, write_rows
from tiny import EOS_ID, save_tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

from cllm.cli import generate
from cllm.decoding import JacobiDecoder
from cllm.evaluation.choice import CANDIDATES
from cllm.prompts import PromptTemplate

QUESTIONS = ["one?", "and two, which is longer?", "3", "four four four four", "five is the last"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", seed=3)


@pytest.fixture
def words(model_dir: Path, tmp_path: Path) -> list[str]:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS])
    given = ["--model", model_dir, "--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl"]
    return [*map(str, given), "--device", "cpu", "--max_tokens", "12", "--batch_size", "2", "--block_size", "4"]


def rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


def test_every_reply_is_the_one_of_its_prompt_alone(words: list[str], model_dir: Path, tmp_path: Path) -> None:
    generate.main(words)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), tiny_tokenizer()
    decoder, found = JacobiDecoder(model, 4, eos_token_ids=[EOS_ID]), rows(tmp_path)
    for number, question in enumerate(QUESTIONS, 1):
        ids = PromptTemplate("chat").encode([{"role": "user", "content": question}], tokenizer)
        (alone,) = decoder.generate([ids], max_new_tokens=12)
        row = found[str(number)]
        assert row["reply"] == tokenizer.decode(alone.token_ids, skip_special_tokens=True)
        assert (row["tokens"], row["forwards"], row["stop"]) == (len(alone.token_ids), alone.forwards, alone.stop)


def test_interrupted_and_resumed(words: list[str], tmp_path: Path) -> None:
    """A killed run's file has some rows and half of another; what is there stays, what is not is answered."""
    generate.main(words)
    whole, lines = rows(tmp_path), (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    kept = [json.loads(line)["id"] for line in lines[:2]]
    generate.main(words)
    assert rows(tmp_path) == whole and list(rows(tmp_path))[:2] == kept
    before = (tmp_path / "out.jsonl").read_text()
    generate.main(words)
    assert (tmp_path / "out.jsonl").read_text() == before


def test_sampled_replies_do_not_depend_on_the_run(words: list[str], tmp_path: Path) -> None:
    sampled = [*words, "--temperature", "0.9", "--seed", "5"]
    generate.main(sampled)
    first = rows(tmp_path)
    generate.main([*sampled, "--no-resume", "--batch_size", "5", "--guess", "prompt_lookup"])
    assert {key: row["reply"] for key, row in rows(tmp_path).items()} == {key: row["reply"] for key, row in first.items()}
    assert len({row["reply"] for row in first.values()}) == len(QUESTIONS)


def test_rows_that_cannot_be_answered_trouble_no_other(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    given = [
        {"prompt": "fine", "id": "x", "max_tokens": 3},
        "no json",
        {"prompt": ""},
        {"messages": talk, "id": "talk"},
        {"messages": talk[:2]},
        {"prompt": "again", "id": "x"},
        {"prompt": "z" * 300, "id": "long"},
        {"question": "?"},
        {"prompt": "p", "max_tokens": 0},
        {"prompt": "p", "max_tokens": 10**30, "id": "huge"},
    ]
    write_rows(tmp_path / "prompts.jsonl", given)
    generate.main(words)
    found, printed = rows(tmp_path), capsys.readouterr().out
    assert set(found) == {"x", "talk", "long", "huge"}
    assert found["x"]["tokens"] <= 3 and "leaves no room in the model's context" in found["long"]["error"]
    assert "max_new_tokens must be between 1 and 2147483647" in found["huge"]["error"]
    assert "2 replies" in printed and "2 prompts that cannot be answered" in printed
    for reason in ("not valid JSON", "the last message is not the user's", "id given twice", "neither prompt nor messages"):
        assert f"1 rows skipped: {reason}" in printed


def test_out_of_memory_a_smaller_batch_is_tried(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flow = JacobiDecoder.flow

    def short(self: JacobiDecoder, *given: Any):
        for iteration in flow(self, *given):
            if len(iteration.rows_B) > 1:
                raise torch.OutOfMemoryError
            yield iteration

    monkeypatch.setattr(JacobiDecoder, "flow", short)
    generate.main([*words, "--batch_size", "4"])
    assert len(rows(tmp_path)) == len(QUESTIONS)
    assert [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()] == [
        f"out of memory; going on with batch size {size}" for size in (2, 1)
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "none.jsonl"], "cannot read none.jsonl"),
        (["--batch_size", "0"], "must be an integer >= 1, got '0'"),
        (["--top_p", "1.5"], "top_p must be between 0 and 1, got 1.5"),
        (["--batch_size", "1" + "0" * 18], "must be an integer <= 2147483647, got '1000000000000000000'"),
        (["--guess", "magic"], "magic"),
        (["--output", "."], "folder"),
        (["--block_size", "300"], "got 300"),
    ],
)
def test_bad_input(words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert message in refused(capsys, generate.main, *words, *more)


def test_other_settings_are_refused(words: list[str], capsys: pytest.CaptureFixture) -> None:
    generate.main(words)
    said = refused(capsys, generate.main, *words, "--max_tokens", "5")
    assert "max_tokens was 12 and is 5" in said and "--output" in said


def test_other_weights_at_the_same_path_are_refused(words: list[str], model_dir: Path, tmp_path: Path, capsys) -> None:
    model = shutil.copytree(model_dir, tmp_path / "m")
    generate.main([*words, "--model", str(model)])
    before = (tmp_path / "out.jsonl").read_text()
    save_tiny_checkpoint(model, seed=4)
    assert "weights was '" in refused(capsys, generate.main, *words, "--model", model)
    assert (tmp_path / "out.jsonl").read_text() == before


def test_a_guess_that_is_measured_changes_no_reply(words: list[str], tmp_path: Path, caplog) -> None:
    generate.main(words)
    expected = {key: row["reply"] for key, row in rows(tmp_path).items()}
    with caplog.at_level("INFO"):
        generate.main([*words, "--no-resume", "--guess", "auto"])
    assert {key: row["reply"] for key, row in rows(tmp_path).items()} == expected
    (said,) = [r.getMessage() for r in caplog.records if "--guess auto" in r.getMessage()]
    pick, figures = re.fullmatch(r"--guess auto: (\S+), by tokens/s on 4 prompts \((.*)\)", said).groups()
    speeds = {guess: float(speed) for guess, speed in (figure.split(" ") for figure in figures.split(", "))}
    assert 1 < len(speeds) < len(CANDIDATES) and set(speeds) < set(CANDIDATES)  # those that nothing left behind early
    assert speeds[pick] == max(speeds.values())


def test_a_file_without_prompts(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"question": "?"}])
    assert "no prompt in" in refused(capsys, generate.main, *words)
