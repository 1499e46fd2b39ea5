"""An append-only JSONL file of results, with the settings that produced them in a file next to it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm.errors import UsageError
from cllm.files import StrPath, append_jsonl, read_jsonl_tolerant, write_json

Row = dict[str, Any]  # one line of the file; "id" identifies what it is the result of


class ResultFile:
    """``rows``: the results by id, including those of an earlier run unless ``resume`` is False.

    ``option``: the command-line option that names the file, for messages. Raises UsageError if an earlier run had other
    settings, naming each difference, or if its settings are missing.
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
        """The rows on disk. Raises UsageError if one of them has no id."""
        rows = read_jsonl_tolerant(self.path)
        if any("id" not in row for row in rows):
            raise UsageError(f"{self.path} is not a file of results: a row has no id")
        return rows

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows; they are on disk when this returns."""
        append_jsonl(self.path, rows)
        self.rows.update((row["id"], row) for row in rows)

    def _check(self, settings: Mapping[str, Any]) -> None:
        earlier = read_settings(self.path)
        if earlier is None:
            raise UsageError(
                f"{self.path} exists, but {settings_path(self.path).name}, which says how it was made, does not; "
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
    """The settings of a result file; None if they are missing or damaged. Raises UsageError if they cannot be read."""
    path = settings_path(results)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return value if isinstance(value, dict) else None


def plain(value: Any) -> Any:
    """A value after a round trip through JSON."""
    return json.loads(json.dumps(value))
