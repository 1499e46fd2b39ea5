"""Results that come one after another: an append-only JSONL file, and beside it the settings that made it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm.errors import UsageError
from cllm.files import StrPath, append_jsonl, read_jsonl_tolerant, write_json

Row = dict[str, Any]  # one line of the file; "id" names what it is the result of


class ResultFile:
    """Opened for an earlier run's file it takes that run's rows over, by id.

    ``option`` is the command's option that names the file, for messages. Raises UsageError, naming each difference, if
    the settings are not the same, and if the file is there without its settings.
    """

    def __init__(self, path: StrPath, settings: Mapping[str, Any], resume: bool, option: str) -> None:
        self.path, self.option = Path(path), option
        self.rows: dict[str, Row] = {}
        if not resume:
            self.path.unlink(missing_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            self._check(settings)
            self.rows = {row["id"]: row for row in self.read()}
        write_json(settings_path(self.path), dict(settings))

    def read(self) -> list[Row]:
        """The rows on the disk. Raises UsageError if one is no result."""
        rows = read_jsonl_tolerant(self.path)
        if any("id" not in row for row in rows):
            raise UsageError(f"{self.path} is not a file of results: a row has no id")
        return rows

    def append(self, rows: Sequence[Row]) -> None:
        """Store rows; they are on the disk when this returns."""
        append_jsonl(self.path, rows)
        self.rows.update((row["id"], row) for row in rows)

    def _check(self, settings: Mapping[str, Any]) -> None:
        earlier = read_settings(self.path)
        if earlier is None:
            raise UsageError(
                f"{self.path} exists, but not {settings_path(self.path).name}, which would say how it was made; "
                f"choose another {self.option}, or pass --no-resume to overwrite it"
            )
        now = plain(dict(settings))
        keys = [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]
        if keys:
            differences = "; ".join(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}" for key in keys)
            raise UsageError(
                f"{self.path} was made with other settings: {differences}. "
                f"Choose another {self.option}, or pass --no-resume to overwrite it"
            )


def settings_path(results: Path) -> Path:
    return results.with_name(results.name + ".settings.json")


def read_settings(results: Path) -> dict[str, Any] | None:
    """The settings that made a result file, None where they are missing or damaged. Raises UsageError where that is unknown."""
    path = settings_path(results)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return value if isinstance(value, dict) else None


def plain(value: Any) -> Any:
    """What JSON makes of a value."""
    return json.loads(json.dumps(value))
