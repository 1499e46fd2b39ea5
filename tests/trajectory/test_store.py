import errno
import fcntl
import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cllm.errors import UsageError
from cllm.trajectory import store
from cllm.trajectory.published import write_published
from cllm.trajectory.record import Dropped, TrajectoryRow
from cllm.trajectory.store import TrajectoryDataset, TrajectoryWriter, read_rows, stored_counts

SETTINGS = {"model": "tiny", "block_size": 4, "eos_token_ids": (2,)}


def make_row(number: int, tokens: int = 10) -> TrajectoryRow:
    rng = random.Random(number)

    def ids(count: int) -> list[int]:
        return [rng.randrange(50_000) for _ in range(count)]

    response, starts = ids(tokens), list(range(0, tokens, 4))
    fixed = [response[start : start + 4] for start in starts]
    return TrajectoryRow(
        row_id=f"row-{number}",
        prompt_ids=ids(5),
        response_ids=response,
        block_starts=starts,
        trajectories=[[ids(len(point)), ids(len(point)), point] for point in fixed],
        augmented=[[ids(len(point))] for point in fixed] if number % 2 else [],
        label_ids=ids(3) if number % 3 else None,
    )


def rows_of(path: Path) -> dict[str, TrajectoryRow]:
    return {row.row_id: row for row in read_rows(path)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def dataset(path: Path, tmp_path: Path, **options: Any) -> TrajectoryDataset:
    return TrajectoryDataset(path, cache_dir=tmp_path / "cache", **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows 0-5 in two shards and two dropped rows."""
    with TrajectoryWriter(tmp_path / "out", SETTINGS, resume=False) as writer:
        writer.write([make_row(n) for n in range(4)], [Dropped("row-90", "loop")])
        writer.write([make_row(4), make_row(5)], [Dropped("row-91", "too long")])
    return tmp_path / "out"


def append(folder: Path, *rows: TrajectoryRow, resume: bool = True) -> None:
    """Open the folder, write a shard if there are rows, and close it."""
    with TrajectoryWriter(folder, SETTINGS, resume) as writer:
        writer.write(rows)


def stored_ids(folder: Path) -> set[str]:
    with TrajectoryWriter(folder, SETTINGS, resume=True) as writer:
        return writer.done_ids


# ---- what comes back ----


def test_rows_survive_a_round_trip(folder: Path) -> None:
    assert rows_of(folder) == {f"row-{n}": make_row(n) for n in range(6)}


def test_dataset(folder: Path, tmp_path: Path) -> None:
    data = dataset(folder, tmp_path)
    assert len(data) == 6
    assert list(data) == [make_row(n) for n in range(6)]
    assert data[-1] == make_row(5)
    with pytest.raises(IndexError):
        data[6]
    assert data.settings == {"model": "tiny", "block_size": 4, "eos_token_ids": [2]}
    assert pickle.loads(pickle.dumps(data))[3] == make_row(3)  # as data loader workers receive it


def test_dataset_is_memory_mapped(folder: Path, tmp_path: Path) -> None:
    assert dataset(folder, tmp_path)._rows.cache_files


def test_dataset_order_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    numbers = list(range(12))
    random.Random(0).shuffle(numbers)
    writer = TrajectoryWriter(tmp_path / "out", SETTINGS, resume=False)
    for n in numbers:
        writer.write([make_row(n)])
    assert [row.row_id for row in dataset(tmp_path / "out", tmp_path)] == [f"row-{n}" for n in range(12)]


def test_dataset_sees_new_and_rewritten_shards(folder: Path, tmp_path: Path) -> None:
    assert len(dataset(folder, tmp_path)) == 6
    append(folder, make_row(6))
    assert len(dataset(folder, tmp_path)) == 7
    other = make_row(6)
    other.prompt_ids[0] += 1
    append(folder, other, resume=False)  # same file name and size
    assert list(dataset(folder, tmp_path)) == [other]


@pytest.mark.parametrize("name", ["with space", "a[1]b*", "ü,=%20"])
def test_odd_folder_names(tmp_path: Path, name: str) -> None:
    append(tmp_path / name, make_row(1))
    assert list(dataset(tmp_path / name, tmp_path)) == [make_row(1)]
    assert stored_ids(tmp_path / name) == {"row-1"}


def test_dataset_of_a_published_file(tmp_path: Path) -> None:
    rows = [make_row(n) for n in range(40)]
    write_published(tmp_path / "t.json", rows, 4, 0)
    data = dataset(tmp_path / "t.json", tmp_path)
    assert list(data) == rows == list(read_rows(tmp_path / "t.json"))
    assert data.settings == {}
    eos = rows[0].response_ids[5]
    assert dataset(tmp_path / "t.json", tmp_path, eos_ids=[eos])[0].response_ids == rows[0].response_ids[:6]


def hub(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list[str]:
    """Let the hub answer with a folder or an error; returns the list of requested names."""
    asked = []

    def snapshot_download(name: str, *, repo_type: str) -> str:
        assert repo_type == "dataset"
        asked.append(name)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_a_hub_name_is_downloaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, folder)
    found = dataset(Path("cllm/some-trajectories"), tmp_path)
    assert asked == ["cllm/some-trajectories"] and found.settings == store._read_settings(folder)
    dataset(folder, tmp_path)
    assert len(asked) == 1


def test_a_hub_name_with_one_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    write_published(tmp_path / "hub" / "data" / "a.json", [make_row(1)], 4, 0)
    hub(monkeypatch, tmp_path / "hub")
    assert len(dataset(Path("cllm/NAME"), tmp_path)) == 1
    (tmp_path / "hub" / "b.json").touch()
    with pytest.raises(UsageError, match=r"cllm/NAME has several files: b.json, data/a.json; .*pass the path of one"):
        dataset(Path("cllm/NAME"), tmp_path)


def test_a_hub_name_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, OSError("offline\nand more"))
    with pytest.raises(UsageError, match=r"no trajectories in cllm/NAME: there is no such path, and the hub says: offline$"):
        dataset(Path("cllm/NAME"), tmp_path)
    with pytest.raises(UsageError):
        dataset(tmp_path / "missing", tmp_path)
    with pytest.raises(UsageError):
        dataset(Path("missing.json"), tmp_path)
    assert asked == ["cllm/NAME"]


def test_shards_are_int32_and_zstd(folder: Path) -> None:
    for shard in folder.glob("part-*.parquet"):
        file = pq.ParquetFile(shard)
        assert file.schema_arrow.equals(store.SCHEMA)
        group = file.metadata.row_group(0)
        assert {group.column(n).compression for n in range(group.num_columns)} == {"ZSTD"}


def test_missing_or_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.json").touch()
    for path in (tmp_path / "empty", tmp_path / "empty.json", tmp_path / "missing"):
        with pytest.raises(UsageError, match=path.name):
            dataset(path, tmp_path)
        with pytest.raises(UsageError, match=path.name):
            list(read_rows(path))


def test_only_dropped_rows(tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path / "out", SETTINGS, resume=False) as writer:
        writer.write([], [Dropped("a", "loop"), Dropped("b", "loop")])
    assert list(read_rows(tmp_path / "out")) == []
    with pytest.raises(UsageError, match="no rows to train on; all 2 were dropped"):
        dataset(tmp_path / "out", tmp_path)


# ---- writing ----


def test_counts(folder: Path) -> None:
    expected = {"kept": 6, "dropped": {"loop": 1, "too long": 1}}
    assert stored_counts(folder) == expected
    writer = TrajectoryWriter(folder, SETTINGS, resume=True)
    assert writer.counts() == expected
    writer.write([make_row(6)], [Dropped("row-92", "loop")])
    assert writer.counts() == stored_counts(folder) == {"kept": 7, "dropped": {"loop": 2, "too long": 1}}


def test_an_empty_shard_is_not_written(tmp_path: Path) -> None:
    append(tmp_path)
    assert names(tmp_path) == {"settings.json"}


def test_invalid_or_duplicate_rows_are_refused(folder: Path) -> None:
    writer = TrajectoryWriter(folder, SETTINGS, resume=True)
    bad = make_row(7)
    bad.response_ids.append(1)
    before = names(folder)
    for rows, dropped, message in [
        ([make_row(1)], [], "already stored: 'row-1'"),
        ([], [Dropped("row-90", "loop")], "already stored: 'row-90'"),
        ([make_row(7), make_row(7)], [], "already stored: 'row-7'"),
        ([make_row(8), bad], [], "row 'row-7'"),
        ([], [Dropped("row-7", "")], "needs an id and a reason"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.write(rows, dropped)
    assert names(folder) == before
    writer.write([make_row(7), make_row(8)])


def test_settings_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        TrajectoryWriter(tmp_path / "out", {"path": tmp_path}, resume=False)
    assert not (tmp_path / "out").exists()


def test_two_writers_share_a_folder(tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path, SETTINGS, resume=False) as first:
        with TrajectoryWriter(tmp_path, SETTINGS, resume=True, rank=1) as second:
            for n in range(0, 20, 2):
                first.write([make_row(n)])
                second.write([make_row(n + 1)])
    assert len(rows_of(tmp_path)) == 20
    assert len(list(tmp_path.glob("part-*.parquet"))) == 20


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"cannot write to {path}"):
            TrajectoryWriter(path, SETTINGS, resume=False)


def test_a_folder_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="no permission"):
        TrajectoryWriter(folder, SETTINGS, resume=False)
    assert len(rows_of(folder)) == 6


# ---- resuming ----


def test_resuming(folder: Path) -> None:
    with TrajectoryWriter(folder, SETTINGS, resume=True) as writer:
        assert writer.done_ids == {"row-90", "row-91", *(f"row-{n}" for n in range(6))}
        writer.write([make_row(6)])
        assert "row-6" in writer.done_ids
    assert len(rows_of(folder)) == 7


def test_resuming_with_other_settings(folder: Path) -> None:
    other = {"model": "tiny", "block_size": 8, "seed": 1}
    before = names(folder)
    with pytest.raises(UsageError) as caught:
        TrajectoryWriter(folder, other, resume=True)
    assert str(caught.value).startswith(f"cannot resume in {folder}, which has other settings: ")
    assert "block_size: 4 there, 8 now; eos_token_ids: [2] there, not set now; seed: not set there, 1 now" in str(caught.value)
    assert names(folder) == before
    with TrajectoryWriter(folder, other, resume=False) as writer:
        assert writer.done_ids == set()
    assert names(folder) == {"settings.json"}
    assert json.loads((folder / "settings.json").read_text()) == other


def test_starting_over_removes_only_its_own_files(folder: Path) -> None:
    (folder / "notes.txt").touch()
    (folder / "part-0.parquet.corrupt").touch()
    append(folder, resume=False)
    assert names(folder) == {"settings.json", "notes.txt"}


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff"])
def test_resuming_without_valid_settings(folder: Path, content: bytes | None) -> None:
    (folder / "settings.json").unlink()
    if content is not None:
        (folder / "settings.json").write_bytes(content)
    with pytest.raises(UsageError, match="settings.json"):
        append(folder)
    append(folder, resume=False)


def test_resuming_in_a_new_folder(tmp_path: Path) -> None:
    assert stored_ids(tmp_path / "a" / "b") == set()
    assert names(tmp_path / "a" / "b") == {"settings.json"}


def damage(shard: Path, how: str) -> None:
    content = shard.read_bytes()
    if how == "empty":
        shard.write_bytes(b"")
    elif how == "half":
        shard.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        shard.write_bytes(os.urandom(len(content)))
    elif how == "other columns":
        pq.write_table(pa.table({"row_id": ["a"]}), shard)
    elif how == "ids":
        column = pq.ParquetFile(shard).metadata.row_group(0).column(0)
        place = column.dictionary_page_offset or column.data_page_offset
        flipped = bytearray(content)
        for index in range(place + column.total_compressed_size - 4, place + column.total_compressed_size):
            flipped[index] ^= 0xFF
        shard.write_bytes(flipped)


@pytest.mark.parametrize("how", ["empty", "half", "garbage", "other columns", "ids"])
def test_damaged_shards_are_collected_again(folder: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    shard = next(path for path in folder.glob("part-*.parquet") if pq.read_metadata(path).num_rows == 3)
    damage(shard, how)
    for read in (lambda: list(read_rows(folder)), lambda: dataset(folder, tmp_path), lambda: stored_counts(folder)):
        with pytest.raises(UsageError, match=f"{shard} is damaged"):
            read()
    with caplog.at_level(logging.WARNING), TrajectoryWriter(folder, SETTINGS, resume=True) as writer:
        assert writer.done_ids == {"row-90", *(f"row-{n}" for n in range(4))}
        assert shard.name + ".corrupt" in names(folder) and shard.name in caplog.text
        writer.write([make_row(4), make_row(5)], [Dropped("row-91", "too long")])
    assert rows_of(folder) == {f"row-{n}": make_row(n) for n in range(6)}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_temporarily_unreadable_shard_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetFile", fail)
        for read in (stored_ids, stored_counts, rows_of):
            with pytest.raises(UsageError, match=f"cannot read {folder}/part-.*: {os.strerror(number)}$"):
                read(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(stored_ids(folder)) == 8


@pytest.mark.parametrize("error", [pa.ArrowMemoryError("out of memory"), pa.ArrowCancelled("cancelled"), MemoryError()])
def test_interrupted_reading_is_not_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    before = names(folder)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(pq.ParquetFile, "read", fail)
        TrajectoryWriter(folder, SETTINGS, resume=True)
    assert names(folder) == before


def test_too_many_open_files(folder: Path) -> None:
    """The real error of the system, raised through pyarrow."""
    code = f"""
import os, resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import Path, stored_ids, store
folder = Path({str(folder)!r})
stored_ids(folder)  # trigger lazy imports
lock = store.WriterLock
def greedy(*args):
    held = lock(*args)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1,) * 2)
    return held
store.WriterLock = greedy
try:
    stored_ids(folder)
except store.UsageError as error:
    print(type(error).__name__, error)
"""
    before = names(folder)
    done = subprocess.run([sys.executable, "-c", code], env=worker_env(), capture_output=True, text=True)
    assert done.stdout.startswith("UsageError cannot read") and os.strerror(errno.EMFILE) in done.stdout, done.stderr
    assert names(folder) == before and len(stored_ids(folder)) == 8


def test_resuming_reads_no_token_column(tmp_path: Path) -> None:
    """Resuming does not notice damaged tokens, since it does not read them; reading them names the file."""
    append(tmp_path / "out", *(make_row(n, tokens=400) for n in range(20)))
    (shard,) = (tmp_path / "out").glob("part-*.parquet")
    group = pq.ParquetFile(shard).metadata.row_group(0)
    content = bytearray(shard.read_bytes())
    for number in range(2, group.num_columns):
        column = group.column(number)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = os.urandom(column.total_compressed_size)
    shard.write_bytes(content)
    assert len(stored_ids(tmp_path / "out")) == 20
    assert stored_counts(tmp_path / "out")["kept"] == 20
    with pytest.raises(UsageError, match=f"{shard} is damaged"):
        list(read_rows(tmp_path / "out"))
    with pytest.raises(UsageError, match="cannot read the trajectories in"):
        dataset(tmp_path / "out", tmp_path)


def test_reading_holds_few_rows_in_memory(tmp_path: Path) -> None:
    def peak(shards: int) -> int:
        folder = tmp_path / str(shards)
        writer = TrajectoryWriter(folder, SETTINGS, resume=False)
        for shard in range(shards):
            writer.write([make_row(20 * shard + n, tokens=200) for n in range(20)])
        arrow = pa.total_allocated_bytes()
        tracemalloc.start()
        most = max(pa.total_allocated_bytes() - arrow for _ in read_rows(folder))
        most += tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(10) < 1.2 * peak(1)


# ---- temporary files ----


def test_the_next_writer_removes_leftovers_of_killed_ones(folder: Path) -> None:
    leftover = folder / ".part-abc.tmp"
    leftover.write_bytes(b"half")
    assert len(rows_of(folder)) == 6  # readers ignore it
    with TrajectoryWriter(folder, SETTINGS, resume=True):
        assert not leftover.exists()
        leftover.write_bytes(b"another process of this run is writing")
        TrajectoryWriter(folder, SETTINGS, resume=True, rank=1).close()
        assert leftover.exists()


# ---- one run at a time ----

HOLDER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_store import SETTINGS, TrajectoryWriter, make_row
writer = TrajectoryWriter({folder!r}, SETTINGS, resume=True, rank={rank})
writer.write([make_row(50 + {rank})])
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("settings", [SETTINGS, {"block_size": 8}])
def test_a_second_run_is_refused_until_the_first_is_dead(folder: Path, rank: int, resume: bool, settings: Any) -> None:
    code = HOLDER.format(tests=str(Path(__file__).parent), folder=str(folder), rank=rank)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=worker_env()) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        before = names(folder)
        with pytest.raises(UsageError, match=f"another process is writing into {folder}; wait until it ends"):
            TrajectoryWriter(folder, settings, resume)
        assert names(folder) == before and len(rows_of(folder)) == 7
        process.kill()
    with TrajectoryWriter(folder, SETTINGS, resume=True) as writer:
        assert f"row-{50 + rank}" in writer.done_ids
    assert not list(folder.glob(".*"))


def test_a_writer_in_this_process_keeps_others_out_until_it_is_closed(folder: Path) -> None:
    with TrajectoryWriter(folder, SETTINGS, resume=True) as first, pytest.raises(UsageError, match="another process"):
        TrajectoryWriter(folder, SETTINGS, resume=True)
    first.close()  # closing twice is allowed
    with TrajectoryWriter(folder, SETTINGS, resume=True), pytest.raises(UsageError, match="another process"):
        append(folder)


def test_a_writer_that_fails_to_open_releases_the_lock(folder: Path) -> None:
    with pytest.raises(UsageError, match="other settings") as caught:
        TrajectoryWriter(folder, {"block_size": 8}, resume=True)
    append(folder, make_row(6))
    assert caught.value and len(rows_of(folder)) == 7


def test_a_lock_file_removed_while_it_is_acquired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder ends after we open the file and before we lock it."""
    first = TrajectoryWriter(folder, SETTINGS, resume=True)
    flock = fcntl.flock

    def late(*args: Any) -> None:
        first.close()
        flock(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        second = TrajectoryWriter(folder, SETTINGS, resume=True)
    with second, pytest.raises(UsageError, match="another process"):
        TrajectoryWriter(folder, SETTINGS, resume=True)


def test_a_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    append(folder, make_row(6))
    assert "cannot be locked (No locks available); make sure that nothing else writes there" in caplog.text and len(rows_of(folder)) == 7


# ---- killed ----

WORKER = """
import sys
sys.path.insert(0, {tests!r})
from test_store import SETTINGS, Dropped, TrajectoryWriter, make_row, store
writer = TrajectoryWriter({folder!r}, SETTINGS, resume=True)
store._encode([])  # trigger pyarrow's lazy imports
print("ready", flush=True)
todo = [n for n in range(9_999) if f"row-{{n}}" not in writer.done_ids]
for n in range(0, len(todo), 3):
    rows = [make_row(todo[n], 400), make_row(todo[n + 1], 400)]
    writer.write(rows, [Dropped(f"row-{{todo[n + 2]}}", "loop")])
    print(*(f"row-{{todo[n + k]}}" for k in range(3)), flush=True)
"""


def worker(folder: Path) -> subprocess.Popen[str]:
    code = WORKER.format(tests=str(Path(__file__).parent), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=worker_env())


def worker_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


def test_a_kill_at_any_moment_loses_no_finished_row(tmp_path: Path) -> None:
    folder, rng = tmp_path / "out", random.Random(5)
    finished: set[str] = set()
    for _ in range(10):
        process = worker(folder)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        timer = threading.Timer(rng.uniform(0.001, 0.15), process.send_signal, [signal.SIGKILL])
        timer.start()
        printed = process.stdout.read()
        assert process.wait() == -signal.SIGKILL
        timer.join()
        complete_lines = printed.rpartition("\n")[0]
        finished.update(complete_lines.split())

        assert [path for path in folder.iterdir() if path.suffix == ".corrupt"] == []
        kept = rows_of(folder) if any(folder.glob("part-*.parquet")) else {}
        for row in kept.values():
            row.validate()
        stored = stored_ids(folder)
        assert finished <= stored
        assert not list(folder.glob(".part-*.tmp"))

    assert finished, "no kill came after a finished shard"
    numbers = {int(row_id.removeprefix("row-")) for row_id in stored}
    assert numbers == set(range(len(numbers)))  # no row is lost or skipped
    assert kept == {row_id: make_row(int(row_id.removeprefix("row-")), 400) for row_id in kept}
    assert len(kept) * 3 == len(stored) * 2


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_kill_at_each_step(tmp_path: Path, step: str) -> None:
    """A kill at each of the steps between which random kills fall."""
    code = f"""
import builtins, os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import SETTINGS, TrajectoryWriter, make_row
writer = TrajectoryWriter({str(tmp_path)!r}, SETTINGS, resume=True)
writer.write([make_row(0)])
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if {step!r} == "open":
    real = builtins.open
    def opened(path, *args):
        real(path, *args).write(b"PAR1 half")
        kill()
    builtins.open = opened
else:
    setattr(os, {step!r}, kill)
writer.write([make_row(1)])
"""
    assert subprocess.run([sys.executable, "-c", code], env=worker_env()).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".part-*.tmp"))) == 1
    assert rows_of(tmp_path) == {"row-0": make_row(0)}
    assert stored_ids(tmp_path) == {"row-0"}
    append(tmp_path, make_row(1))
    assert len(rows_of(tmp_path)) == 2 and not list(tmp_path.glob(".part-*.tmp"))


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    append(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import SETTINGS, TrajectoryWriter, make_row
rank = int(sys.argv[1])
writer = TrajectoryWriter({str(tmp_path)!r}, SETTINGS, resume=True, rank=rank + 1)
for n in range(rank, 60, 3):
    writer.write([make_row(n)])
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank)], env=worker_env()) for rank in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert rows_of(tmp_path) == {f"row-{n}": make_row(n) for n in range(60)}
    assert not list(tmp_path.glob(".*.tmp"))


# ---- disk full ----


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    writer = TrajectoryWriter(folder, SETTINGS, resume=True)
    before = names(folder)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(UsageError, match=f"cannot write {folder}/part-.*: {os.strerror(number)}"):
            writer.write([make_row(6)])
    assert names(folder) == before
    assert "row-6" not in writer.done_ids and writer.counts()["kept"] == 6
    writer.write([make_row(6)])  # once there is room again
    assert rows_of(folder)["row-6"] == make_row(6)


def fill_up(folder: Path) -> tuple[int, str]:
    """Write until it fails; returns the number of rows stored and the message."""
    writer = TrajectoryWriter(folder, SETTINGS, resume=True)
    for number in range(1000):
        try:
            writer.write([make_row(number, tokens=100 * 2**number)])
        except UsageError as error:
            return number, str(error)
    raise AssertionError("it never failed")


def test_a_file_size_limit(tmp_path: Path) -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_store import fill_up
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
print(*fill_up(Path({str(tmp_path)!r})))
"""
    result = subprocess.run([sys.executable, "-c", code], env=worker_env(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    stored, _, message = result.stdout.partition(" ")
    assert "cannot write" in message and os.strerror(errno.EFBIG) in message
    check_after_full(tmp_path, int(stored))


@pytest.mark.parametrize("small_disk", ["256k"], indirect=True)
def test_a_full_disk(small_disk: Path) -> None:
    stored, message = fill_up(small_disk)
    assert "cannot write" in message and os.strerror(errno.ENOSPC) in message
    check_after_full(small_disk, stored)


@pytest.mark.parametrize("small_disk", ["256k"], indirect=True)
def test_a_disk_full_from_the_start(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * (256 << 10))
    with pytest.raises(UsageError, match="cannot write"):
        TrajectoryWriter(small_disk, SETTINGS, resume=True)
    assert names(small_disk) == {"filler"}


def check_after_full(folder: Path, stored: int) -> None:
    assert stored > 0
    assert set(rows_of(folder)) == {f"row-{n}" for n in range(stored)}
    assert not list(folder.glob(".*.tmp"))
    assert len(stored_ids(folder)) == stored
    append(folder, make_row(stored))
    assert len(rows_of(folder)) == stored + 1


@pytest.mark.parametrize("name", ["vocabulary", "weights", "source_rows"])
def test_older_folders_resume_without_a_later_setting_and_then_store_it(tmp_path: Path, name: str) -> None:
    append(tmp_path)
    TrajectoryWriter(tmp_path, SETTINGS | {name: "one"}, resume=True).close()
    for other in ("two", None):
        with pytest.raises(UsageError, match=f'{name}: "one" there, {json.dumps(other)} now'):
            TrajectoryWriter(tmp_path, SETTINGS | {name: other}, resume=True)


MEASURE = """
import sys
import datasets
from cllm.training.examples import ExampleDataset, StateSampling
from cllm.training.sampler import LengthGroupedSampler
from cllm.trajectory.store import TrajectoryDataset

def own_memory():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

before = own_memory()
examples = ExampleDataset(TrajectoryDataset(sys.argv[1], cache_dir=sys.argv[2]), StateSampling())
most = 0
for index in LengthGroupedSampler(examples, 4, seed=0):
    examples[index]
    most = max(most, own_memory() - before)
print(most, examples.rows._rows.data.nbytes)
"""


@pytest.mark.slow
def test_training_reads_a_store_without_holding_it_in_memory(tmp_path: Path) -> None:
    """Over one epoch grouped by length, the process's own memory grows by a fraction of the store's size."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("the system does not say how much memory is a process's own")
    ids = list(range(256))
    blocks = [[ids[at : at + 16]] * 17 for at in range(0, 256, 16)]
    rows = [TrajectoryRow(f"r{place}", ids[:8], ids, ids[::16], blocks, [], None) for place in range(100)]
    with TrajectoryWriter(tmp_path / "t", {}, resume=False) as writer:
        writer.write(rows)
    (shard,) = (tmp_path / "t").glob("part-*")
    table = pq.read_table(shard)
    for copy in range(40):
        names = pa.array([f"{copy}-{place}" for place in range(100)])
        pq.write_table(table.set_column(0, "row_id", names), shard.with_name(f"part-{copy}.parquet"))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "t"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    most, size = map(int, done.stdout.split())
    assert size > 64 << 20 and most < size / 2, (most, size)
