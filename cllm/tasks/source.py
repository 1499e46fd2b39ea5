"""Where examples come from: a local file, or the task's dataset on the hub, read lazily."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cllm.errors import UsageError
from cllm.files import StrPath
from cllm.tasks.base import BadRow, Example, HubDataset, NumberedRow, Task

logger = logging.getLogger(__name__)

LOGGED_BAD_ROWS = 10


@dataclass(frozen=True)
class Extent:
    """How many rows a source has, and a fingerprint of their content."""

    rows: int
    fingerprint: str


class ExampleStream:
    """The examples of a source, in order. Every iteration reads the source again, in constant memory.

    ``bad`` counts the rows that the latest iteration has skipped so far, by reason. ``source`` names the source, for messages.
    """

    def __init__(self, task: Task, filename: StrPath | None, split: str, limit: int | None) -> None:
        self.bad: Counter[str] = Counter()
        self.source = f"hub dataset of {task.name}" if filename is None else str(filename)
        self._task, self._filename, self._split, self._limit = task, filename, split, limit
        self._found: list[str] = []

    def __iter__(self) -> Iterator[Example]:
        self.bad.clear()
        self._found.clear()
        count = 0
        for example in islice(self._good(), self._limit):
            count += 1
            yield example
        if not count:
            raise UsageError(self._nothing())
        if self.bad:
            logger.warning("%s: %d bad rows skipped", self.source, self.bad.total())

    def extent(self) -> Extent | None:
        """The extent of a local source, regardless of the limit. None for the hub dataset, which would have to be downloaded."""
        if self._filename is None:
            return None
        rows, digest = 0, hashlib.blake2b(digest_size=8)
        for row in self._rows():
            rows += 1
            digest.update(repr(row).encode("utf-8", "backslashreplace"))
        return Extent(rows, digest.hexdigest())

    def _good(self) -> Iterator[Example]:
        for item in self._task.read(self._rows(), self._split):
            if isinstance(item, Example):
                yield item
                continue
            self.bad[item.reason] += 1
            if self.bad.total() <= LOGGED_BAD_ROWS:
                logger.warning("%s: skipped %s", self.source, item)

    def _rows(self) -> Iterator[NumberedRow]:
        if self._filename is not None:
            rows = self._task.open(Path(self._filename), self._split)
        else:
            rows = _hub_rows(self._task, self._split)
        for number, row in rows:
            if not self._found and isinstance(row, dict):
                self._found.extend(map(str, row))
            yield number, row

    def _nothing(self) -> str:
        found = f"found the fields {', '.join(self._found[:20])}" if self._found else "found no JSON object"
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.bad.most_common(3)) or "no rows"
        return f"no usable row for task {self._task.name!r} in {self.source}: expected rows with {self._task.fields}; {found} ({reasons})"


def load_examples(task: Task, filename: StrPath | None, split: str, limit: int | None = None) -> ExampleStream:
    """The examples of a local file or, when ``filename`` is None, of the task's default file or its hub dataset.

    Args:
        task: how rows are read (:func:`cllm.tasks.get_task`).
        filename: JSONL or a JSON list, plain or ``.gz``; some tasks also take a folder or other files.
        split: train or test; part of the examples' ids, and the split of the hub dataset.
        limit: the most examples to give; None for all.

    Raises:
        UsageError: at once or while iterating, if the source cannot be read or holds no usable row.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of examples must be >= 1, got {limit}")
    if filename is None:
        filename = task.default_file(split)
    if filename is None:
        _hub_split(task, split)
    return ExampleStream(task, filename, split, limit)


def _hub_split(task: Task, split: str) -> tuple[HubDataset, str]:
    if task.hub is None:
        raise UsageError(f"task {task.name!r} has no hub dataset; pass --filename")
    if split not in task.hub.splits:
        splits = ", ".join(task.hub.splits)
        raise UsageError(f"unknown split {split!r} of {task.hub.path}; choose from {splits}, or pass --filename")
    return task.hub, task.hub.splits[split]


def _hub_rows(task: Task, split: str) -> Iterator[NumberedRow]:
    hub, hub_split = _hub_split(task, split)
    try:
        from datasets import load_dataset

        files = {"data_files": hub.data_files} if hub.data_files else {}
        rows = load_dataset(hub.path, hub.config, split=hub_split, streaming=True, **files)
        for number, row in enumerate(rows, 1):
            yield number, dict(row) if isinstance(row, dict) else BadRow(number, "not a JSON object")
    except Exception as error:  # network, hub and data errors have no common base
        first_line = (str(error).splitlines() or [""])[0]
        problem = f"cannot read {hub.path} from the hub ({type(error).__name__}: {first_line})"
        raise UsageError(f"{problem}; pass --filename") from error
