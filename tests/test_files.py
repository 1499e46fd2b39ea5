"""cllm.files: faults of files, and what a kill or a full disk leaves behind."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm import files
from cllm.errors import UsageError
from cllm.files import (
    BadRow,
    append_jsonl,
    numbered_folders,
    open_text,
    read_jsonl_tolerant,
    read_rows,
    write_json,
    write_text,
)

ROWS: list[dict[str, Any]] = [{"a": 1}, {"b": "ü\u2028"}, {"c": [1.5, None]}]


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text", [lines_of(ROWS), json.dumps(ROWS), json.dumps(ROWS, indent=2), lines_of(ROWS)[:-1]])
@pytest.mark.parametrize("lead", ["", "\ufeff", "\n\n  "])
def test_rows_in_all_formats(tmp_path: Path, text: str, lead: str, packed: bool) -> None:
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.json")
    data = (lead + text).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert [row for _, row in read_rows(path)] == ROWS


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n\n[2]\n"x"\n' + "[" * 100_000 + "\n" + "9" * 5000 + '\n{"a": 2}\r\n')
    rows = list(read_rows(path))
    assert [number for number, _ in rows] == [1, 2, 4, 5, 6, 7, 8]
    assert [row for _, row in rows if isinstance(row, dict)] == [{"a": 1}, {"a": 2}]
    bad = [row for _, row in rows if isinstance(row, BadRow)]
    assert [row.reason for row in bad] == ["not valid JSON"] + ["not a JSON object"] * 2 + ["not valid JSON"] * 2
    assert str(bad[0]).startswith("line 2: not valid JSON (")
    assert [row.line for row in bad] == [2, 4, 5, 6, 7]


def test_list_items_that_are_not_objects(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, 3, {"a": 2}]')
    assert list(read_rows(path)) == [(1, {"a": 1}), (2, BadRow(2, "not a JSON object", "got int")), (3, {"a": 2})]


def test_numbered_folders(tmp_path: Path) -> None:
    for name in ("part-10", "part-9", "part-0", "part-2-backup", "part-", "part-03", "part-1.5", "apart-4", "part-٤"):
        (tmp_path / name).mkdir()
    (tmp_path / "part-7").touch()
    assert list(numbered_folders(tmp_path, "part").items()) == [(n, tmp_path / f"part-{n}") for n in (0, 9, 10)]
    assert numbered_folders(tmp_path / "none", "part") == {}


def test_a_damaged_list_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\n[\n{"a": 1},\n{"a": }\n]')
    with pytest.raises(UsageError, match=r"rows\.json.* line 4"):
        list(read_rows(path))


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"\n" * 100_000 + b"\xff\xff\n")
    rows = read_rows(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(UsageError, match="not UTF-8"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "No such file"),
        ("empty.jsonl", b"", "empty file"),
        ("empty.jsonl.gz", b"", "empty file"),
        ("nothing.jsonl.gz", gzip.compress(b"", mtime=0), "empty file"),
        ("plain.jsonl.gz", b'{"a": 1}\n', "not a gzip file"),
        ("cut.jsonl.gz", gzip.compress(os.urandom(5000).hex().encode())[:-200], "not a gzip file, or a damaged one"),
        ("latin.jsonl", '{"a": "ü"}\n'.encode("latin-1"), "not UTF-8"),
        ("packed.jsonl", gzip.compress(b'{"a": 1}\n', mtime=0), "not UTF-8"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        list(read_rows(path))
    assert name in str(error.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got a folder"), open_text(tmp_path):
        pass


def test_errors_of_the_caller_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(FileNotFoundError), open_text(path):
        raise FileNotFoundError("another file")


def test_write_replaces_and_creates_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "value.json"
    write_json(path, {"x": float("nan"), "y": [float("inf"), 1.5], "z": "ü", "lone": "\ud800"})
    write_text(path.with_name("t.txt"), "old")
    write_text(path.with_name("t.txt"), "new")
    assert json.loads(path.read_text()) == {"x": None, "y": [None, 1.5], "z": "ü", "lone": "\ud800"}
    assert path.with_name("t.txt").read_text() == "new"
    assert sorted(os.listdir(path.parent)) == ["t.txt", "value.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_write_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(UsageError, match=r"a\.txt: no space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_devices_and_folders_are_not_overwritten(tmp_path: Path) -> None:
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(UsageError, match="not a regular file"):
            write_text(path, "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "x")


def test_a_failed_append_keeps_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, ROWS)
    before = path.read_bytes()
    code = (
        "import resource, signal, sys; from cllm.files import append_jsonl, UsageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: append_jsonl(sys.argv[1], [{'x': 'y' * 5000}])\n"
        "except UsageError: sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[1]).returncode == 7
    assert path.read_bytes() == before


json_rows = st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.none(), max_size=3), max_size=5)


@given(first=json_rows, second=json_rows, cut=st.integers(0, 400))
def test_a_truncated_last_line_costs_only_its_row(first: list[dict], second: list[dict], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        append_jsonl(path, first)
        whole = path.read_bytes()
        cut = min(cut, len(whole))
        path.write_bytes(whole[: len(whole) - cut])
        kept = read_jsonl_tolerant(path)
        assert kept == first[: len(kept)]
        finished = whole[: len(whole) - cut].count(b"\n")
        assert finished <= len(kept) <= finished + 1
        append_jsonl(path, second)
        assert read_jsonl_tolerant(path) == kept + second


def test_a_long_truncated_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": "' + "x" * 200_000)
    append_jsonl(path, [{"c": 2}])
    assert path.read_text() == '{"a": 1}\n{"c": 2}\n'


def test_a_damaged_line_in_the_middle_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\x00\x00\xff\n{"a": 2}\n{"a"')
    assert read_jsonl_tolerant(path) == [{"a": 1}, {"a": 2}]
    assert "line 2 dropped: damaged line" in caplog.text and "line 4 dropped: partial last line" in caplog.text
    assert read_jsonl_tolerant(tmp_path / "none.jsonl") == []
    with pytest.raises(UsageError):
        read_jsonl_tolerant(tmp_path)


def test_kill_loses_no_finished_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from cllm.files import append_jsonl\n"
        "start = int(sys.argv[2])\n"
        "for i in range(start, start + 10**6):\n"
        "    append_jsonl(sys.argv[1], [{'i': i, 'pad': 'x' * 5000}])\n"
        "    print(i, flush=True)\n"
    )
    told = -1
    for delay in (0.05, 0.1, 0.02):
        arguments = [sys.executable, "-c", code, str(path), str(told + 1)]
        with subprocess.Popen(arguments, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = int(process.stdout.readline())
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            told = int(([str(told)] + [line for line in process.stdout if line.endswith("\n")])[-1])
        rows = [row["i"] for row in read_jsonl_tolerant(path)]
        assert rows == list(range(len(rows))) and len(rows) >= told + 1
        told = len(rows) - 1
