"""Files and folders: JSON rows with or without gzip, atomic writes, crash-safe result files, numbered folders."""

import errno
import gzip
import json
import logging
import math
import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from cllm.errors import UsageError

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. ``reason`` is one of a few fixed texts, so that rows can be counted by it; ``detail`` varies."""

    line: int  # 1-based line of the file, or item of the list
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@contextmanager
def open_text(path: StrPath) -> Iterator[TextIO]:
    """Open a UTF-8 text file, plain or ``.gz``, for reading in a ``with`` statement.

    Raises:
        UsageError: naming the path, if it is missing, a folder, unreadable, empty, damaged gzip or not UTF-8, even if
            that shows only while reading.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"expected a file, got a folder: {path}")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        probe = opener(path, "rb")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    try:
        with probe:
            if not probe.read(1):
                raise UsageError(f"empty file: {path}")
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield cast(TextIO, file)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UsageError(f"not a gzip file, or a damaged one: {path} ({error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: {path} ({error.reason})") from error


def read_rows(path: StrPath) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield (1-based line or item number, row) of a JSONL file or a JSON list, plain or ``.gz``.

    A file that starts with ``[`` is a list and is read whole; any other is JSONL and is streamed. Blank lines are skipped.
    A malformed line, or one that is not an object, gives a :class:`BadRow`.

    Raises:
        UsageError: if the file cannot be read (:func:`open_text`) or a list is not valid JSON.
    """
    with open_text(path) as file:
        number, first = 1, file.readline()
        while first.isspace():
            number, first = number + 1, file.readline()
        first = first.strip()
        if first.startswith("["):
            yield from _items(first + "\n" + file.read(), path, number)
            return
        while True:
            if first:
                yield number, _row(first, number)
            if not (line := file.readline()):
                return
            number, first = number + 1, line.strip()


def _items(text: str, path: StrPath, first_line: int) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno + first_line - 1}"
        raise UsageError(f"not a valid JSON list: {path} ({error.msg} at {where})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not a valid JSON list: {path} ({error})") from error
    for number, item in enumerate(items, 1):
        yield number, item if isinstance(item, dict) else _no_object(item, number)


def _row(text: str, number: int) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(number, "not valid JSON", str(error))
    return value if isinstance(value, dict) else _no_object(value, number)


def _no_object(value: Any, number: int) -> BadRow:
    return BadRow(number, "not a JSON object", f"got {type(value).__name__}")


def numbered_folders(parent: StrPath, name: str) -> dict[int, Path]:
    """The folders named exactly ``NAME-NUMBER`` in ``parent``, by number, in ascending order."""
    found = ((re.fullmatch(rf"{re.escape(name)}-(0|[1-9][0-9]*)", path.name), path) for path in Path(parent).glob(f"{name}-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_dir()))


def write_text(path: StrPath, text: str) -> None:
    """Write a UTF-8 file atomically: readers see the old content or all of the new. Creates parent folders.

    Raises:
        UsageError: naming the path, if it cannot be written (disk full, no permission, a folder).
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UsageError(f"cannot write {path}: it exists and is not a regular file")
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(_encode(text))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise _write_error(path, error) from error


def write_json(path: StrPath, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically (:func:`write_text`). NaN and infinities become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_jsonl(path: StrPath, rows: Iterable[Any]) -> None:
    """Append rows to a JSONL file and force them to disk before returning. For one writer at a time.

    First removes a partial last line that a killed writer left. If writing fails, the file is otherwise unchanged.

    Raises:
        UsageError: naming the path, if it cannot be written.
    """
    payload = _encode("".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a+b", buffering=0) as file:
            end, missing_newline = _sound_end(file)
            file.truncate(end)
            try:
                _write_all(file, (b"\n" if missing_newline else b"") + payload)
            except OSError:
                file.truncate(end)
                raise
            os.fsync(file.fileno())
    except OSError as error:
        raise _write_error(path, error) from error


def read_jsonl_tolerant(path: StrPath) -> list[dict[str, Any]]:
    """Read a file of :func:`append_jsonl`; [] if it is missing. Drops, with a warning, lines that are partial or damaged."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _object(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            kind = "partial last line" if number == len(lines) else "damaged line"
            logger.warning("%s: line %d dropped: %s", path, number, kind)
    return rows


def _sound_end(file: Any) -> tuple[int, bool]:
    """Where the last complete row of an open binary file ends, and whether its newline is missing."""
    size = file.seek(0, os.SEEK_END)
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    last = tail.rpartition(b"\n")[2]
    if not last:
        return size, False
    return (size, True) if _object(last) is not None else (size - len(last), False)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _write_all(file: Any, payload: bytes) -> None:
    view = memoryview(payload)
    while view:
        view = view[file.write(view) :]


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes \udXXX, which JSON readers decode


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(path: StrPath, error: OSError) -> UsageError:
    reason = "no space left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
    return UsageError(f"cannot write {path}: {reason}")
