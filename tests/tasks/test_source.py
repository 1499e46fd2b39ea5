"""cllm.tasks.source: examples of files and of the hub, lazily, with bad rows counted and named."""

import gzip
import json
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import UsageError
from cllm.tasks import get_task
from cllm.tasks.base import NumberedRow
from cllm.tasks.gsm8k import Gsm8k
from cllm.tasks.source import load_examples

GSM8K = get_task("gsm8k")


def good(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(count)]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_examples_in_order_with_stable_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [good(3)[0], "{broken", good(3)[1], good(3)[2]])
    stream = load_examples(GSM8K, path, "train")
    assert [example.id for example in stream] == ["gsm8k-train-1", "gsm8k-train-3", "gsm8k-train-4"]
    assert [example.target for example in stream] == ["1", "2", "3"]  # a second reading starts anew
    assert dict(stream.bad) == {"not valid JSON": 1}


def test_limit_counts_good_rows_and_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["bad", *good(2), "bad", *good(1)])
    stream = load_examples(GSM8K, path, "test", limit=2)
    assert len(list(stream)) == 2 and stream.bad.total() == 1
    for limit in (0, -1):
        with pytest.raises(UsageError, match=f">= 1, got {limit}"):
            load_examples(GSM8K, path, "test", limit=limit)


def test_examples_are_lazy() -> None:
    class Endless(Gsm8k):
        def open(self, path: Path, split: str) -> Iterator[NumberedRow]:
            yield from ((number, row) for number, row in enumerate(good(1) * 3, 1))
            raise AssertionError("read on")

    stream = iter(load_examples(Endless(), "any", "train", limit=3))
    assert [next(stream).id for _ in range(3)][-1] == "gsm8k-train-3"
    assert next(stream, None) is None


def test_the_first_ten_bad_rows_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", [*good(1), *["bad"] * 12, {"question": " ", "answer": "#### 1"}])
    stream = load_examples(GSM8K, path, "train")
    with caplog.at_level(logging.WARNING):
        list(stream)
    assert dict(stream.bad) == {"not valid JSON": 12, "empty question": 1}
    assert [f"skipped line {n}:" in caplog.text for n in (2, 11, 12)] == [True, True, False]
    assert "13 bad rows skipped" in caplog.text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "x", "completion": "y"}] * 3, r"expected rows with question and answer.*prompt, completion.*: 3"),
        (["oops", "[1]"], "found no JSON object .*not valid JSON: 1, not a JSON object: 1"),
        (["", " "], r"found no JSON object \(no rows\)"),
        (["[]"], r"found no JSON object \(no rows\)"),
    ],
)
def test_no_good_row_at_all(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(UsageError, match=message):
        list(load_examples(GSM8K, path, "train"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.jsonl"):
        list(load_examples(GSM8K, tmp_path / "none.jsonl", "train"))


def test_equal_rows_have_one_fingerprint_however_they_are_written(tmp_path: Path) -> None:
    """Lines, a list, with blank lines between, packed; read in part or whole."""
    rows = [*good(5), "bad"]
    lines = write(tmp_path / "a.jsonl", rows)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    extents = {load_examples(GSM8K, path, "train", limit).extent() for path in (lines, packed) for limit in (None, 2)}
    assert len(extents) == 1 and extents.pop().rows == 6
    listed = tmp_path / "c.json"
    listed.write_text(json.dumps(good(5), indent=1))
    assert load_examples(GSM8K, listed, "train").extent() == load_examples(GSM8K, write(tmp_path / "d.jsonl", good(5)), "train").extent()


def test_any_other_row_changes_the_fingerprint(tmp_path: Path) -> None:
    rows = good(5)
    variants = [rows, rows[:4], rows[::-1], [*rows, "bad"], [*rows, ""], [rows[0] | {"source": "x"}, *rows[1:]], ["", *rows]]
    found = [load_examples(GSM8K, write(tmp_path / f"{n}.jsonl", rows), "train").extent() for n, rows in enumerate(variants)]
    assert found[0] == found[4] and len(set(found)) == len(variants) - 1  # a blank line at the end is no row


def test_the_hub_is_not_fetched_to_know_its_extent() -> None:
    assert load_examples(GSM8K, None, "train").extent() is None


def fake_hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((args, options))
        return good(5)

    fake_hub(monkeypatch, load_dataset)
    assert [e.id for e in load_examples(GSM8K, None, "test", limit=2)] == ["gsm8k-test-1", "gsm8k-test-2"]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "streaming": True})]


@pytest.mark.parametrize("when", ["opening", "reading"])
def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def load_dataset(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        if when == "opening":
            raise ConnectionError("no route\nmore")
        return broken()

    def broken() -> Iterator[dict[str, str]]:
        yield good(1)[0]
        raise ConnectionError("no route\nmore")

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(UsageError, match=r"openai/gsm8k .*\(ConnectionError: no route\); pass --filename"):
        list(load_examples(GSM8K, None, "train"))


def test_the_tasks_default_file_comes_before_the_hub(tmp_path: Path) -> None:
    class Local(type(GSM8K)):  # type: ignore[misc]
        def default_file(self, split: str) -> Path | None:
            return path if split == "test" else None

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "#### 3"}) + "\n")
    stream = load_examples(Local(), None, "test")
    assert [e.id for e in stream] == ["gsm8k-test-1"] and stream.source == str(path)
    assert load_examples(Local(), None, "train").source == "hub dataset of gsm8k"


def test_hub_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown split 'dev' of openai/gsm8k; choose from train, test"):
        load_examples(GSM8K, None, "dev")
    monkeypatch.setattr(type(GSM8K), "hub", None)
    with pytest.raises(UsageError, match="'gsm8k' has no hub dataset; pass --filename"):
        load_examples(GSM8K, None, "train")


@pytest.mark.parametrize(("split", "rows"), [("train", 7473), ("test", 1319)])
def test_real_gsm8k(shared_data: Path, split: str, rows: int) -> None:
    stream = load_examples(GSM8K, shared_data / "gsm8k" / f"{split}.jsonl.gz", split)
    examples = list(stream)
    assert len(examples) == rows and not stream.bad
    assert len({example.id for example in examples}) == rows
    with gzip.open(shared_data / "gsm8k" / f"{split}.jsonl.gz", "rt") as file:
        first = json.loads(next(file))
    assert examples[0].messages == ({"role": "user", "content": first["question"]},)
    assert examples[0].reference == first["answer"]
