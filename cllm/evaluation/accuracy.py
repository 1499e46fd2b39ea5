"""Answers to a task's questions: decoded batch by batch, stored in a JSONL file that a later run resumes from, and scored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cllm.decoding import GREEDY, JacobiDecoder, Sampling
from cllm.errors import UsageError
from cllm.evaluation.interval import mean_interval, ratio_interval
from cllm.evaluation.prompt import Prompt, batches
from cllm.files import StrPath
from cllm.prompts import PromptTemplate
from cllm.result_file import ResultFile, Row, plain
from cllm.tasks.base import Example, Message, Task, user_turn

TOO_LONG = "prompt too long"
MOST_GROUPS = 20  # a tag with more values groups nothing
NEEDED = ("id", "question", "target", "reply")
TEXTS = ("id", "question", "reply")  # those that are text


class AnswerFile(ResultFile):
    """The answers to a task's examples, by example id."""

    def __init__(self, path: StrPath, settings: Mapping[str, Any], resume: bool = True) -> None:
        super().__init__(path, settings, resume, option="--output_file_name")

    def read(self) -> list[Row]:
        return checked_answers(super().read(), self.path)

    def has(self, example: Example) -> bool:
        """Whether the example was answered. Raises UsageError if the file answers another question under its id."""
        row = self.rows.get(example.id)
        if row is None:
            return False
        asked = (row["question"], row.get("follow_ups", []), row["target"])
        if asked != (question_of(example), list(example.follow_ups), plain(example.target)):
            raise UsageError(
                f"{self.path} answers another question as {example.id}; it belongs to another --filename. "
                "Choose another --output_file_name, or pass --no-resume to start afresh"
            )
        return True


def checked_answers(rows: list[Row], path: str | Path) -> list[Row]:
    """The rows themselves. Raises UsageError, naming the file, if a row is not an answer."""
    for row in rows:
        missing = [name for name in NEEDED if name not in row]
        if missing:
            raise UsageError(f"{path} is not a file of answers: a row has no {', '.join(missing)}")
        no_texts = [name for name in TEXTS if not isinstance(row[name], str)]
        if no_texts:
            raise UsageError(f"{path} is not a file of answers: {', '.join(no_texts)} of row {row['id']!r} is not text")
    return rows


def answer(
    decoder: JacobiDecoder,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[Prompt],
    template: PromptTemplate,
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
) -> Iterator[list[Row]]:
    """Decode prompts, the shortest first so that batches have little padding, and yield the rows of each batch.

    Each example draws with a seed that depends on ``sampling.seed`` and its id alone, so its reply is the same in any
    batch. An example with follow-ups is a conversation: each of them is asked, through ``template``, with the replies so far.
    """
    for batch in batches(sorted(prompts, key=lambda prompt: len(prompt.ids)), batch_size):
        samplings = [sampling.derive(prompt.example.id) for prompt in batch]
        turns = _converse(decoder, tokenizer, batch, template, max_new_tokens, samplings)
        yield rescore(task, [_row(prompt, replies) for prompt, replies in zip(batch, turns, strict=True)])


def too_long_rows(task: Task, prompts: Sequence[Prompt]) -> list[Row]:
    """Rows of prompts that leave no room in the model's context: empty replies, which count as wrong."""
    return rescore(task, [_row(prompt, [NO_ROOM]) for prompt in prompts])


@dataclass(frozen=True)
class Turn:
    """One reply of a conversation and what it cost."""

    reply: str
    tokens: int
    forwards: int
    stop: str


NO_ROOM = Turn("", 0, 0, TOO_LONG)


def _converse(
    decoder: JacobiDecoder,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    template: PromptTemplate,
    max_new_tokens: int,
    samplings: Sequence[Sampling],
) -> list[list[Turn]]:
    """The turns of each conversation. One that outgrows the model's context ends with NO_ROOM."""
    turns: list[list[Turn]] = [[] for _ in batch]
    asked = {at: prompt.ids for at, prompt in enumerate(batch)}
    while asked:
        results = decoder.generate(list(asked.values()), max_new_tokens=max_new_tokens, sampling=[samplings[at] for at in asked])
        for at, result in zip(list(asked), results, strict=True):
            reply = str(tokenizer.decode(result.token_ids, skip_special_tokens=True))
            turns[at].append(Turn(reply, len(result.token_ids), result.forwards, result.stop))
            del asked[at]
            if len(turns[at]) > len(batch[at].example.follow_ups):
                continue
            ids = template.encode(conversation(batch[at].example, [turn.reply for turn in turns[at]]), tokenizer)
            if decoder.context is None or len(ids) < decoder.context:
                asked[at] = ids
            else:
                turns[at].append(NO_ROOM)
    return turns


def conversation(example: Example, replies: Sequence[str]) -> list[Message]:
    """The messages up to the next follow-up, with the model's own replies, white space around them left out."""
    messages = list(example.messages)
    for reply, follow_up in zip(replies, example.follow_ups, strict=False):
        messages += [{"role": "assistant", "content": reply.strip()}, {"role": "user", "content": follow_up}]
    return messages


def _row(prompt: Prompt, turns: Sequence[Turn]) -> Row:
    """``reply`` is the last one, which is scored; ``replies`` are all of them, "" for those never asked for."""
    example = prompt.example
    replies = [turn.reply for turn in turns]
    replies += [""] * (1 + len(example.follow_ups) - len(replies))
    row: Row = {"id": example.id, "question": question_of(example), "target": plain(example.target)}
    row["reply"] = replies[-1]
    if example.follow_ups:
        row |= {"follow_ups": list(example.follow_ups), "replies": replies}
    return row | {
        "tags": dict(example.tags),
        "prompt_tokens": len(prompt.ids),
        "tokens": sum(turn.tokens for turn in turns),
        "forwards": sum(turn.forwards for turn in turns),
        "stop": _stop([turn.stop for turn in turns]),
    }


def _stop(stops: Sequence[str]) -> str:
    """Why a conversation ended: what cut it short, if anything did."""
    cuts = [stop for stop in stops if stop != "eos"]
    return TOO_LONG if TOO_LONG in cuts else (cuts or ["eos"])[0]


def question_of(example: Example) -> str:
    return example.messages[-1]["content"]


def source_of(example: Example, task: Task) -> str:
    """What ``--dev_set`` looks at: the row's ``source``, or the task's name where rows have none."""
    return example.tags.get("source", task.name).lower()


def select(examples: Iterable[Example], task: Task, dev_set: str, limit: int | None) -> list[Example]:
    """The examples of one source (``all`` for every one), at most ``limit``. Raises UsageError when there is none."""
    chosen: list[Example] = []
    sources: dict[str, None] = {}
    for example in examples:
        sources[source_of(example, task)] = None
        if dev_set.lower() in ("all", source_of(example, task)):
            chosen.append(example)
            if limit is not None and len(chosen) == limit:
                break
    if not chosen:
        raise UsageError(f"no row has the source {dev_set!r}; choose from all, {', '.join(list(sources)[:MOST_GROUPS])}")
    return chosen


def samples(examples: Iterable[Example], count: int) -> list[Example]:
    """Each example ``count`` times, as NAME, NAME#2, NAME#3 and so on."""
    return [
        example if number == 1 else replace(example, id=f"{example.id}#{number}") for example in examples for number in range(1, count + 1)
    ]


def problems(rows: Sequence[Row]) -> list[str]:
    """The id of the problem that each row is a sample of."""
    ids = {row["id"] for row in rows}
    first = (re.sub("#[0-9]+$", "", row["id"]) for row in rows)
    return [name if name in ids else row["id"] for name, row in zip(first, rows, strict=True)]


def rescore(task: Task, rows: Sequence[Row]) -> list[Row]:
    """The rows with fresh scores, from their own question, target and reply."""
    scores = task.score_all([(row["reply"], example_of(row)) for row in rows])
    return [row | score for row, score in zip(rows, scores, strict=True)]


def example_of(row: Row) -> Example:
    """The example that a row answers, as far as scoring needs it."""
    follow_ups = tuple(row.get("follow_ups") or ())
    return Example(user_turn(row["question"]), None, row["target"], row.get("tags") or {}, follow_ups, id=row["id"])


def summarise(task: Task, rows: Sequence[Row], *, seed: int = 0) -> dict[str, Any]:
    """Scores with 95% intervals, TPF and length, of all rows and of each group of them. Rows must have been scored."""
    summary = _summary(task, rows, seed)
    summary["groups"] = {name: _summary(task, group, seed) for name, group in groups(rows).items()}
    return summary


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by ``tag=value``, for tags that have between 2 and 20 values."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        for tag, value in (row.get("tags") or {}).items():
            found.setdefault(tag, {}).setdefault(str(value), []).append(row)
    useful = {tag: values for tag, values in found.items() if 2 <= len(values) <= MOST_GROUPS}
    return {f"{tag}={value}": group for tag, values in useful.items() for value, group in sorted(values.items())}


def _summary(task: Task, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    answered = [row for row in rows if row.get("stop") != TOO_LONG]
    tokens, forwards = [[row.get(key, 0) for row in answered] for key in ("tokens", "forwards")]
    interval = ratio_interval(tokens, forwards, problems=problems(answered), seed=seed) if sum(forwards) else None
    return {
        "answers": len(rows),
        "scores": {name: _score(rows, name, seed) for name in score_names(task, rows)},
        "tokens_per_forward": sum(tokens) / sum(forwards) if sum(forwards) else None,
        "tokens_per_forward_interval": interval,
        "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
        "unfinished": sum(row.get("stop") in ("length", "context") for row in answered),
        "too_long": [row["id"] for row in rows if row.get("stop") == TOO_LONG],
    }


def _score(rows: Sequence[Row], name: str, seed: int) -> dict[str, Any]:
    values = [row[name] for row in rows]
    interval = mean_interval(values, problems=problems(rows), seed=seed)
    return {"mean": sum(values) / len(values), "interval": interval, "sum": sum(values)}


def score_names(task: Task, rows: Sequence[Row]) -> list[str]:
    """What the task scores, its main metric first."""
    if not rows:
        return [task.metric]
    names = list(task.score("", example_of(rows[0])))
    return sorted(names, key=lambda name: name != task.metric)
