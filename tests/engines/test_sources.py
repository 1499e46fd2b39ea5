"""Collection from a server and from a file: what our engine stores, whatever happens on the way."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import failed, question_rows, refused, write_rows
from scripted import fault, serving
from tiny import save_tiny_checkpoint, tiny_tokenizer

from cllm.cli import collect
from cllm.trajectory.record import TrajectoryRow
from cllm.trajectory.store import TrajectoryWriter, read_rows

COUNT = 8
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose responses are all worth keeping."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "d.jsonl", question_rows(COUNT))


def words(model: Path, data: Path, output: Path, *more: Any) -> list[str]:
    sound = ["--task", "gsm8k", "--model", model, "--filename", data, "--output", output, "--device", "cpu", "--max_new_tokens", 4]
    return [*map(str, sound), "--max_new_seq_len", "12", "--batch_size", "3", *map(str, more)]


def run(*given: Any) -> dict[str, TrajectoryRow]:
    collect.main(words(*given))
    return {row.row_id: row for row in read_rows(given[2])}


@pytest.fixture(scope="module")
def ours(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrajectoryRow]:
    rows = run(model, data, tmp_path_factory.mktemp("ours") / "t")
    assert len(rows) == COUNT
    return rows


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def served(ours: dict[str, TrajectoryRow], change: Callable[[int, list[int]], Any] = lambda number, ids: ids) -> Any:
    """The script of a server of the model: ``change`` gives another answer, given how many were asked for and the right one."""
    known = {tuple(row.prompt_ids): row.response_ids for row in ours.values()}
    asked = 0

    def script(number: int, body: Any) -> Any:
        nonlocal asked
        if body is None:
            return 200, {}, json.dumps({"data": [{"id": "some-name", "max_model_len": 256}]})
        assert body["temperature"] == 0 and body["return_token_ids"] and body["max_tokens"] == 12
        asked += 1
        answer = change(asked, known[tuple(body["prompt"])])
        return answer if isinstance(answer, str | tuple) else (200, {}, json.dumps({"choices": [{"text": "", "token_ids": answer}]}))

    return script


def test_a_server_gives_the_rows_of_our_engine(ours, model, data, tmp_path, capsys) -> None:
    with serving(served(ours)) as server:
        assert run(model, data, tmp_path / "t", "--base_url", server.url) == ours
    assert f"0 of {COUNT} responses are not what the model here writes greedily" in capsys.readouterr().out
    assert json.loads((tmp_path / "t" / "settings.json").read_text())["responses"] == "server"


def test_faults_that_pass(ours, model, data, tmp_path) -> None:
    faults = {1: fault(503), 3: "drop", 4: fault(429), 6: (200, {}, "{torn")}
    with serving(served(ours, lambda asked, ids: faults.get(asked, ids))) as server:
        assert run(model, data, tmp_path / "t", "--base_url", server.url) == ours


def test_a_server_that_dies_loses_and_doubles_nothing(ours, model, data, tmp_path, capsys) -> None:
    with serving(served(ours, lambda asked, ids: ids if asked < 6 else fault(500))) as server:
        message = failed(capsys, collect.main, *words(model, data, tmp_path / "t", "--base_url", server.url))
        assert "HTTP 500" in message and "run again to go on" in message
    there = list(read_rows(tmp_path / "t"))
    assert 0 < len(there) < COUNT
    with serving(served(ours)) as server:
        assert run(model, data, tmp_path / "t", "--base_url", server.url) == ours
        assert len(server.seen) == 1 + COUNT - len(there)


def test_a_request_that_is_refused_is_left_out(ours, model, data, tmp_path, capsys) -> None:
    with serving(served(ours, lambda asked, ids: fault(400, "too long") if asked == 2 else ids)) as server:
        rows = run(model, data, tmp_path / "t", "--base_url", server.url)
    assert len(rows) == COUNT - 1
    assert "1 left out: refused by the server: HTTP 400" in capsys.readouterr().out


def test_responses_that_are_not_the_models_own_are_counted(ours, model, data, tmp_path, capsys) -> None:
    def change(asked: int, ids: list[int]) -> list[int]:
        return [*ids[:5], ids[5] % 90 + 5, *ids[6:]] if asked == 3 else [*ids[:2], 12345] if asked == 4 else ids

    with serving(served(ours, change)) as server:
        rows = run(model, data, tmp_path / "t", "--base_url", server.url)
    printed = capsys.readouterr().out
    assert f"1 of {COUNT - 1} responses are not what" in printed and "1 left out: tokens that the model does not have" in printed
    match = re.search(r"^  (gsm8k-train-\d): from token 5 on, (\S+) below the best logit$", printed, re.MULTILINE)
    assert match and float(match[2]) > 0 and rows[match[1]] != ours[match[1]]
    assert rows[match[1]].trajectories[0][-1] == rows[match[1]].response_ids[: len(rows[match[1]].trajectories[0][-1])]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (lambda number, body: (200, {}, json.dumps({"data": []})), "serves no model"),
        (lambda number, body: (200, {}, json.dumps({"data": [{"id": "a"}, {"id": "b"}]})), "serves a, b, and not"),
        (lambda number, body: (200, {}, "[]"), "does not list its models"),
        (lambda number, body: fault(404), "does not list its models"),
    ],
)
def test_servers_that_are_refused(model, data, tmp_path, capsys, script, message) -> None:
    with serving(script) as server:
        assert message in refused(capsys, collect.main, *words(model, data, tmp_path / "t", "--base_url", server.url))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("answer", [None, "text", fault(400, "Extra inputs are not permitted: return_token_ids")])
def test_text_without_ids_is_refused(ours, model, data, tmp_path, capsys, answer) -> None:
    if not isinstance(answer, tuple):
        answer = 200, {}, json.dumps({"choices": [{"text": "x", "token_ids": answer}]})
    with serving(served(ours, lambda asked, ids: answer)) as server:
        assert "pass --responses FILE" in failed(capsys, collect.main, *words(model, data, tmp_path / "t", "--base_url", server.url))


def rows_of_file(ours: dict[str, TrajectoryRow], data: Path, form: str) -> Iterator[dict[str, Any]]:
    tokenizer = tiny_tokenizer()
    questions = [row["question"] for row in question_rows(COUNT)]
    for row, question in zip(sorted(ours.values(), key=lambda row: row.row_id), questions):
        if form == "ids":
            yield {"prompt_token_ids": row.prompt_ids, "token_ids": row.response_ids}
        elif form == "text":
            yield {"prompt": question, "response": tokenizer.decode(row.response_ids), "finish_reason": "length"}
        else:
            reply = {"role": "assistant", "content": tokenizer.decode(row.response_ids)}
            yield {"messages": [{"role": "user", "content": question}, reply], "finish_reason": "length"}


@pytest.mark.parametrize("form", ["ids", "text", "messages"])
def test_a_file_gives_the_rows_of_our_engine(ours, model, data, tmp_path, capsys, caplog, form) -> None:
    file = write_rows(tmp_path / "r.jsonl", [*rows_of_file(ours, data, form), {"prompt": "x"}, "{torn"])
    assert run(model, data, tmp_path / "t", "--responses", file) == ours
    assert f"0 of {COUNT} responses are not" in capsys.readouterr().out
    assert "1 rows skipped: no token_ids, and no response as text" in caplog.text


def test_a_file_without_some_responses(ours, model, data, tmp_path, capsys) -> None:
    file = write_rows(tmp_path / "r.jsonl", list(rows_of_file(ours, data, "ids"))[:5])
    assert len(run(model, data, tmp_path / "t", "--responses", file)) == 5
    assert "3 left out: no response in the file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--responses", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--base_url", "localhost:8000"], "--base_url must look like http"),
        (["--base_url", "http://127.0.0.1:9/v1", "--engine", "vllm"], "responses have one source"),
        (["--tensor_parallel_size", "2"], "is an option of --engine vllm"),
    ],
)
def test_refusals(model, data, tmp_path, capsys, more, message) -> None:
    assert message in refused(capsys, collect.main, *words(model, data, tmp_path / "t", *more))


def test_a_file_without_a_response(model, data, tmp_path, capsys) -> None:
    file = write_rows(tmp_path / "r.jsonl", [{"prompt": "x"}])
    assert "no response can be read from" in refused(capsys, collect.main, *words(model, data, tmp_path / "t", "--responses", file))


def test_stored_responses_are_of_one_source(ours, model, data, tmp_path, capsys) -> None:
    run(model, data, tmp_path / "t")
    file = write_rows(tmp_path / "r.jsonl", rows_of_file(ours, data, "ids"))
    assert "responses" in refused(capsys, collect.main, *words(model, data, tmp_path / "t", "--responses", file))


def test_killed_in_the_middle(ours, model, data, tmp_path, monkeypatch) -> None:
    file = write_rows(tmp_path / "r.jsonl", rows_of_file(ours, data, "ids"))
    write, stored = TrajectoryWriter.write, 0

    def once(self: TrajectoryWriter, *batch: Any) -> None:
        nonlocal stored
        stored += 1
        if stored == 2:
            raise KeyboardInterrupt
        write(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(TrajectoryWriter, "write", once)
        run(model, data, tmp_path / "t", "--responses", file)
    assert run(model, data, tmp_path / "t", "--responses", file) == ours
