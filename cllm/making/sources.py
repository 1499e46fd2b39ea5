"""Where prompts come from: the user's files and tasks' data, mixed, deduplicated, and ordered by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cllm.errors import UsageError
from cllm.files import StrPath
from cllm.tasks import OWN_PROMPTS, is_task, task_names
from cllm.tasks.base import Example, Task
from cllm.tasks.configure import configured_task
from cllm.tasks.source import load_examples

HELD_OUT_SHARE = 5  # one prompt in five is held out
HELD_OUT_MOST = 64


@dataclass(frozen=True)
class Source:
    """A file of the user's own prompts, a task's data on the hub, or a file of a task's rows."""

    task: Task
    file: str | None

    @classmethod
    def parse(cls, text: StrPath) -> Source:
        """``FILE``, ``TASK`` or ``TASK:FILE``. Raises UsageError for anything else."""
        name, _, file = str(text).partition(":")
        if str(text) and Path(text).exists() and not is_task(text):
            return cls(configured_task(OWN_PROMPTS, "collect", filename=str(text)), str(text))
        if not is_task(name):
            tasks = ", ".join(task_names())
            raise UsageError(f"no such file: {text}; prompts are FILE, TASK or TASK:FILE, the task one of {tasks}")
        if file and not Path(file).exists():
            raise UsageError(f"no such file: {file}")
        return cls(configured_task(name, "collect", filename=file or None), file or None)

    @property
    def label(self) -> str:
        """What the model card calls it, without a path."""
        return Path(self.file).name if self.file else self.task.name

    def stamp(self) -> list[str | None]:
        """Changes when the task or the content of the file does; a folder is known by the names and sizes of its files."""
        if self.file is None:
            return [self.task.name, None]
        path = Path(self.file)
        if path.is_file():
            with path.open("rb") as stream:
                return [self.task.name, hashlib.file_digest(stream, "sha256").hexdigest()]
        files = sorted(f"{file.relative_to(path)} {file.stat().st_size}" for file in path.rglob("*") if file.is_file())
        return [self.task.name, hashlib.sha256("\n".join(files).encode()).hexdigest()]


@dataclass
class Gathered:
    """Prompts by a hash of their text, in the order of the hashes, and how many were left out, by reason."""

    examples: dict[str, Example] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def leave_out(self, hashes: Iterable[str], reason: str) -> None:
        left_out = [name for name in hashes if self.examples.pop(name, None) is not None]
        if left_out:
            self.count(reason, len(left_out))

    def count(self, reason: str, times: int = 1) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + times


def gather(sources: Sequence[Source], split: str) -> Gathered:
    """All prompts of the sources. Raises UsageError for a file that cannot be read or holds no usable row."""
    found = Gathered()
    examples: dict[str, Example] = {}
    for source in sources:
        stream = load_examples(source.task, source.file, split)
        for example in stream:
            name = digest(example)
            if name in examples:
                found.count("asked more than once")
            examples.setdefault(name, example)
        for reason, times in stream.bad.items():
            found.count(reason, times)
    found.examples = dict(sorted(examples.items()))
    return found


def digest(example: Example) -> str:
    return hashlib.sha256(json.dumps(example.messages, sort_keys=True).encode()).hexdigest()


def split_off(gathered: Gathered) -> dict[str, Example]:
    """Remove and return the held-out prompts: always the same ones for the same prompts."""
    count = min(max(len(gathered.examples) // HELD_OUT_SHARE, 1), HELD_OUT_MOST)
    return {name: gathered.examples.pop(name) for name in list(gathered.examples)[:count]}
