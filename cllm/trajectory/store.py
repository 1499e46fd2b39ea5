"""Trajectories on disk: a folder of Parquet shards and settings.json. Token ids only, one row per response.

A shard is written under a hidden name, synced to disk and renamed, so a file with a final name is complete. The name is a
digest of the shard's row ids, so writers of several processes share a folder without collisions. Dropped rows are stored
beside the kept ones (column ``dropped`` holds the reason), so that resuming does not try them again.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from cllm.errors import UsageError
from cllm.files import write_json
from cllm.trajectory.lock import WriterLock
from cllm.trajectory.published import atomic_write, read_published
from cllm.trajectory.record import Dropped, TrajectoryRow

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_TOKENS = pa.list_(pa.int32())
_STATES = pa.list_(pa.list_(_TOKENS))  # block, state, token
SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("dropped", pa.string()),
        ("prompt_ids", _TOKENS),
        ("response_ids", _TOKENS),
        ("block_starts", _TOKENS),
        ("trajectories", _STATES),
        ("augmented", _STATES),
        ("label_ids", _TOKENS),
    ]
)
SETTINGS = "settings.json"
OPTIONAL_SETTINGS = {"vocabulary", "weights", "source_rows"}  # settings that older folders lack; compared only where present
BATCH_ROWS = 16  # rows held as Python lists while reading a shard


class TrajectoryWriter:
    """Writes shards into a folder under an exclusive lock. Use it in a ``with`` statement.

    The processes of one run share a folder: rank 0 opens it first and alone, then the others with ``resume=True``. No row may
    be given to two of them.

    Args:
        folder: created if missing.
        settings: what the rows depend on; JSON values only.
        resume: keep the stored rows and add to them. False removes them.
        rank: this process's rank in the run.

    Attributes:
        done_ids: ids of all stored rows, kept and dropped.

    Raises:
        UsageError: the folder cannot be used or read, another run is writing there, or it was written with other settings;
            the message names each difference.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], resume: bool, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.done_ids: set[str] = set()
        self._counts: Counter[str | None] = Counter()
        settings = json.loads(json.dumps(settings))
        self._make_folder()
        self._lock = WriterLock(self.folder, rank)
        try:
            if resume:
                _check_settings(self.folder, settings)
            if rank == 0:
                _remove_leftovers(self.folder)
            if resume:
                self._read_done()
            else:
                _remove_shards(self.folder)
            if _read_settings(self.folder) != settings:
                write_json(self.folder / SETTINGS, settings)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder for other writers."""
        self._lock.release()

    def write(self, rows: Sequence[TrajectoryRow], dropped: Sequence[Dropped] = ()) -> None:
        """Store rows and dropped rows atomically as one shard, which is synced to disk on return.

        Raises:
            ValueError: a row is inconsistent, or an id is already stored.
            UsageError: the disk is full or the folder cannot be written; earlier shards are safe.
        """
        ids = [row.row_id for row in rows] + [drop.row_id for drop in dropped]
        self._check_ids(ids)
        for row in rows:
            row.validate()
        if not ids:
            return
        name = hashlib.blake2b(json.dumps(ids).encode(), digest_size=12).hexdigest()
        payload = _encode([*map(_row_values, rows), *map(_dropped_values, dropped)])
        with atomic_write(self.folder / f"part-{name}.parquet", self.folder / f".part-{name}.tmp") as stream:
            stream.write(payload)
        self.done_ids.update(ids)
        self._counts[None] += len(rows)
        self._counts.update(drop.reason for drop in dropped)

    def counts(self) -> dict[str, Any]:
        """{"kept": rows, "dropped": {reason: rows}} of what the folder held on opening and what was written since."""
        return _as_counts(self._counts)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {self.folder}: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {self.folder}: no permission, or a read-only disk")

    def _read_done(self) -> None:
        for shard in _shards(self.folder):
            try:
                ids, reasons = _read_status(shard)
            except CorruptShard as error:
                _set_aside(shard, error)
                continue
            self.done_ids.update(ids)
            self._counts.update(reasons)

    def _check_ids(self, ids: list[str]) -> None:
        twice = [row_id for row_id, count in Counter(ids).items() if count > 1 or row_id in self.done_ids]
        if twice:
            raise ValueError(f"rows already stored: {', '.join(map(repr, twice[:10]))}")


class CorruptShard(UsageError):
    """A shard whose content is damaged, as opposed to one that cannot be read at the moment."""


class TrajectoryDataset:
    """The kept rows of a folder of shards, or of a published JSON file, as a map-style dataset of `TrajectoryRow`.

    Rows of a folder are ordered by id (numbers in it by value), however they are sharded; ``datasets`` memory-maps them from a
    cache file that it builds from the shards. A JSON file is held in memory as int32.

    Args:
        path: a folder, a file, or the hub name of a dataset that holds either (``cllm/NAME``), which is downloaded.
        eos_ids: tokens that end the responses of a published JSON file; those of a folder were truncated at collection.
        cache_dir: where the cache file goes; default: the cache of ``datasets``.

    Attributes:
        settings: the writer's settings; {} for a JSON file.

    Raises:
        UsageError: nothing is there or on the hub, no row was kept, or a file cannot be read.
    """

    def __init__(self, path: str | Path, eos_ids: Collection[int] = (), cache_dir: str | Path | None = None) -> None:
        path = _resolve(path)
        if path.is_dir():
            self.settings = _read_settings(path) or {}
            self._rows, self._order = _load_shards(path, cache_dir)
        else:
            self.settings = {}
            self._rows = _load_published(path, eos_ids)
            self._order = list(range(len(self._rows)))
        if not self._order:
            raise UsageError(f"{path}: no rows to train on; all {len(self._rows)} were dropped at collection")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> TrajectoryRow:
        return _to_row(self._rows[self._order[index]])

    def __iter__(self) -> Iterator[TrajectoryRow]:
        return (self[index] for index in range(len(self)))


def read_rows(path: str | Path, eos_ids: Collection[int] = ()) -> Iterator[TrajectoryRow]:
    """Stream the kept rows of a folder, in no particular order, or of a published JSON file.

    Raises:
        UsageError: as `TrajectoryDataset`, on reaching the row.
    """
    path = Path(path)
    if not path.is_dir():
        yield from read_published(path, eos_ids)
        return
    for shard in _require_shards(path):
        with _open_shard(shard) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=SCHEMA.names):
                yield from (_to_row(values) for values in batch.to_pylist() if values["dropped"] is None)


def stored_counts(folder: str | Path) -> dict[str, Any]:
    """{"kept": rows, "dropped": {reason: rows}} over all shards of a folder.

    Raises:
        UsageError: there is no shard, or one cannot be read.
    """
    return _as_counts(Counter(reason for _, reason in _status(_require_shards(Path(folder)))))


def _as_counts(reasons: Counter[str | None]) -> dict[str, Any]:
    dropped = {reason: count for reason, count in sorted(reasons.items(), key=str) if reason is not None}
    return {"kept": reasons[None], "dropped": dropped}


# ---- settings ----


def _read_settings(folder: Path) -> dict[str, Any] | None:
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must hold an object, got {type(settings).__name__}")
    return settings


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    stored = _read_settings(folder)
    if stored is None:
        if _shards(folder):
            raise UsageError(f"cannot resume in {folder}: it has shards but no {SETTINGS}; start over, or write elsewhere")
        return
    differences = [
        f"{name}: {_show(stored, name)} there, {_show(settings, name)} now"
        for name in sorted((stored.keys() | settings.keys()) - (OPTIONAL_SETTINGS - stored.keys()))
        if _show(stored, name) != _show(settings, name)
    ]
    if differences:
        raise UsageError(f"cannot resume in {folder}, which has other settings: {'; '.join(differences)}. Start over, or write elsewhere")


def _show(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name], sort_keys=True) if name in settings else "not set"


# ---- files ----


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _require_shards(folder: Path) -> list[Path]:
    shards = _shards(folder)
    if not shards:
        raise UsageError(f"no trajectories in {folder}: it has no part-*.parquet; run cllm collect first")
    return shards


def _remove_shards(folder: Path) -> None:
    """Remove the settings last: a kill in between leaves fewer rows, never rows with the wrong settings."""
    for path in (*_shards(folder), *folder.glob("part-*.parquet.corrupt"), folder / SETTINGS):
        path.unlink(missing_ok=True)


def _set_aside(shard: Path, error: CorruptShard) -> None:
    aside = shard.with_name(shard.name + ".corrupt")
    logger.warning("renamed to %s: %s", aside.name, error)
    shard.replace(aside)


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed writers; the lock rules out active ones."""
    for path in folder.glob(".part-*.tmp"):
        path.unlink(missing_ok=True)


def _resolve(path: str | Path) -> Path:
    """The path itself if it exists or cannot be a hub name; else the downloaded dataset: its folder, or its one JSON file."""
    from cllm.models import HUB_NAME, first_line

    name = str(path)
    if Path(path).exists() or "/" not in name or not HUB_NAME.fullmatch(name):
        return Path(path)
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:  # no network, no such dataset, a full disk: the library raises nearly anything
        raise UsageError(f"no trajectories in {name}: there is no such path, and the hub says: {first_line(error)}") from error
    files = sorted(file for file in folder.rglob("*") if file.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")))
    if _shards(folder) or not files:
        return folder
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:10])
        raise UsageError(f"{name} has several files: {names}; pass the path of one of them, in {folder}")
    return files[0]


# ---- rows and Arrow ----


def _row_values(row: TrajectoryRow) -> dict[str, Any]:
    return {**vars(row), "dropped": None}


def _dropped_values(drop: Dropped) -> dict[str, Any]:
    if not drop.row_id or not drop.reason:
        raise ValueError(f"a dropped row needs an id and a reason, got {drop}")
    return {"row_id": drop.row_id, "dropped": drop.reason}


def _to_row(values: dict[str, Any]) -> TrajectoryRow:
    return TrajectoryRow(**{name: value for name, value in values.items() if name != "dropped"})


def _encode(values: list[dict[str, Any]]) -> memoryview:
    """A shard as Parquet bytes: zstd, with page checksums."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(values, schema=SCHEMA)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


@contextmanager
def _open_shard(shard: Path) -> Iterator[pq.ParquetFile]:
    """Open a shard for reading inside a ``with`` statement.

    Raises:
        CorruptShard: its content is damaged.
        UsageError: the system cannot read it. System errors have an errno, which tells them from decoding errors.
    """
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise pa.ArrowInvalid("its columns are not those of a trajectory shard")
            yield file
    except (pa.ArrowMemoryError, pa.ArrowCancelled):
        raise
    except (pa.ArrowException, OSError) as error:
        number = getattr(error, "errno", None)
        if number is not None:
            raise UsageError(f"cannot read {shard}: {os.strerror(number)}") from error
        raise CorruptShard(f"{shard} is damaged: {error}; resuming collects its rows again") from error


def _read_status(shard: Path) -> tuple[list[str], list[str | None]]:
    """Row ids and drop reasons (None: kept) of a shard; reads no other column."""
    with _open_shard(shard) as file:
        table = file.read(columns=["row_id", "dropped"])
    return table["row_id"].to_pylist(), table["dropped"].to_pylist()


def _status(shards: list[Path]) -> Iterator[tuple[str, str | None]]:
    """Row id and drop reason of every stored row, in the order of the shards."""
    for shard in shards:
        yield from zip(*_read_status(shard), strict=True)


def _load_shards(folder: Path, cache_dir: str | Path | None) -> tuple[Dataset, list[int]]:
    """All stored rows as a memory-mapped dataset, and the indices of the kept ones in the order of their ids."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    shards = _require_shards(folder)
    kept = {row_id: index for index, (row_id, reason) in enumerate(_status(shards)) if reason is None}
    try:
        patterns = [glob.escape(str(shard)) for shard in shards]
        rows = Dataset.from_parquet(patterns, cache_dir=str(cache_dir) if cache_dir else None)
    except (pa.ArrowException, OSError, DatasetsError) as error:
        raise UsageError(f"cannot read the trajectories in {folder}: {error}") from error
    return rows, [kept[row_id] for row_id in sorted(kept, key=_natural_key)]


def _natural_key(row_id: str) -> list[tuple[int, str]]:
    """Natural sort key: "x-2" before "x-10"."""
    parts = re.split(r"([0-9]+)", row_id)  # text, number, text, ...
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)] + [(0, row_id)]


def _load_published(path: Path, eos_ids: Collection[int]) -> Dataset:
    from datasets import Dataset

    batches, pending = [], []
    for row in read_published(path, eos_ids):
        pending.append(_row_values(row))
        if len(pending) == BATCH_ROWS:
            batches.append(pa.RecordBatch.from_pylist(pending, schema=SCHEMA))
            pending = []
    batches.append(pa.RecordBatch.from_pylist(pending, schema=SCHEMA))
    return Dataset(pa.Table.from_batches(batches, schema=SCHEMA))
