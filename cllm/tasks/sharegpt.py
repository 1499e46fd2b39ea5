"""Chat: ShareGPT conversations, and the two-turn questions of MT-bench (Zheng et al. 2023).

A row is recognised by its fields, whatever the split:

- ``conversations`` [{from, value}] (ShareGPT) or ``messages`` [{role, content}], optionally with ``system`` or
  ``system_prompt``: the first user turn is asked; with ``--multi_turn``, every user turn that the dataset answers, each after
  the conversation before it;
- ``turns`` [text, ...] with ``question_id`` (MT-bench): all are asked, each after our own replies to those before it.

No rule says whether a chat reply is right: without a judge, the only score is whether the reply is not blank.
"""

import copy
import json
import time
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Self

from cllm.errors import UsageError
from cllm.files import write_text
from cllm.tasks.base import BadField, Example, HubDataset, Message, Review, Task, text_field, user_turn

if TYPE_CHECKING:
    from cllm.scoring.judge import Judge

_SYSTEM = ("system", "system_prompt")  # fields beside the turns
_SPEAKERS = {"system": "system", "developer": "system"}
_SPEAKERS |= dict.fromkeys(("human", "user", "prompter"), "user")
_SPEAKERS |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant")


class ShareGpt(Task):
    """Conversations. Answers to MT-bench's questions can be judged by a model."""

    name = "sharegpt"
    description = "ShareGPT conversations; MT-bench's two-turn questions"
    fields = "conversations or messages, or question_id and turns"
    metric = "answered"
    hub = HubDataset(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        None,
        {"train": "train"},
        "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",
    )
    plain_template = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: {question} ASSISTANT:"
    )
    default_question = "How do tides work, and why are there usually two high tides a day?"
    export_format = "FastChat's model answers"

    multi_turn = False
    model_id = "model"
    judge: "Judge | None" = None

    def add_options(self, options: ArgumentParser, command: str) -> None:
        options.add_argument(
            "--multi_turn",
            action="store_true",
            help="ask every turn that the data answers, after the conversation before it; default: first turns only",
        )
        if command == "acc":
            from cllm.scoring.judge import add_options

            options.add_argument("--model_id", help="name in the exported answers; default: the last part of the path")
            add_options(options)

    def configure(self, args: Namespace) -> Self:
        task = copy.copy(self)
        task.multi_turn = getattr(args, "multi_turn", False)
        task.model_id = getattr(args, "model_id", None) or PurePath(getattr(args, "model", None) or self.model_id).name
        if hasattr(args, "judge_model"):
            from cllm.scoring.judge import configured

            task.judge = configured(args)
        return task

    def settings(self) -> dict[str, Any]:
        return {"multi_turn": True} if self.multi_turn else {}

    def scoring_settings(self) -> dict[str, Any]:
        return {} if self.judge is None else self.judge.facts

    def example(self, row: Mapping[str, Any]) -> Example:
        """A question of MT-bench, or the first turn of a conversation."""
        return _question(row) if "turns" in row else next(self._answered_turns(row))

    def examples(self, row: Mapping[str, Any], split: str) -> Iterable[Example]:
        """With ``--multi_turn``, one for each turn of a conversation that the data answers."""
        return self._answered_turns(row) if self.multi_turn and "turns" not in row else [self.example(row)]

    def _answered_turns(self, row: Mapping[str, Any]) -> Iterator[Example]:
        """One for each user turn that the data answers, and always one for the first."""
        messages, turn = conversation_of(row), 0
        for at, message in enumerate(messages):
            if message["role"] != "user":
                continue
            reference = messages[at + 1]["content"] if at + 1 < len(messages) else None
            if not turn or reference is not None:
                turn += 1
                yield Example(tuple(messages[: at + 1]), reference, tags={"turn": str(turn)} if self.multi_turn else {})

    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """``answered``: the reply is not blank. Its quality is for a judge (:meth:`review`)."""
        return {"answered": bool(reply.strip())}

    def export(self, rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
        """Writes FastChat's answer file, a line per question: ``{question_id, answer_id, model_id, choices: [{index, turns}], tstamp}``."""
        answers = [self._answer(row) for row in rows if _is_question(row)]
        if not answers:
            return False
        answers.sort(key=lambda answer: (str(type(answer["question_id"])), answer["question_id"]))
        write_text(path, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        return True

    def _answer(self, row: Mapping[str, Any]) -> dict[str, Any]:
        turns = [reply.strip() for reply in row.get("replies") or [row["reply"]]]
        question_id = row["target"]["question_id"]
        content = json.dumps([self.model_id, question_id, turns])
        return {
            "question_id": question_id,
            "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, content).hex,
            "model_id": self.model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }

    def review(self, rows: Sequence[Mapping[str, Any]], path: Path) -> Review:
        """The judge's mean scores by category and turn; {} without ``--judge_model``."""
        if self.judge is None:
            return {}
        from cllm.scoring.judge import Case

        cases = []
        for row in filter(_is_question, rows):
            target, follow_ups = row["target"], row.get("follow_ups") or []
            replies = tuple(reply.strip() for reply in row.get("replies") or [row["reply"]])
            category = (row.get("tags") or {}).get("category", "")
            references = tuple(target.get("reference") or ())
            cases.append(Case(target["question_id"], category, (row["question"], *follow_ups), replies, references))
        if not cases:
            raise UsageError("--judge_model judges answers to MT-bench's questions, but these are answers to other questions")
        return self.judge.review(cases, self.model_id, path.with_suffix(".judgments.jsonl"))


def conversation_of(row: Mapping[str, Any]) -> list[Message]:
    """The turns of a row: optionally a system message, then user and assistant alternating.

    Everything the system says before the first user turn, in fields of its own or as turns, becomes one message. Assistant turns
    before the first user turn are dropped (ShareGPT's conversations come in pieces), and the conversation is cut where the
    speakers no longer alternate or a turn cannot be used. Raises BadField if no user turn is left.
    """
    system = [text_field(row, name).strip() for name in _SYSTEM if str(row.get(name) or "").strip()]
    messages: list[Message] = []
    reason = "no user turn"
    for turn in _turns(row):
        role, content = _turn(turn)
        if not messages and role in ("assistant", "system"):
            system += [content] if role == "system" and content else []
            continue
        due = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        if role is None or role != due or not content:
            reason = "unknown speaker" if role is None else "a turn without text" if not content else reason
            break
        messages.append({"role": role, "content": content})
    if not messages:
        raise BadField(reason)
    told = "\n\n".join(dict.fromkeys(system))
    return [{"role": "system", "content": told}, *messages] if told else messages


def _turns(row: Mapping[str, Any]) -> list[Any]:
    for name in ("conversations", "messages"):
        if name in row:
            if not isinstance(row[name], list):
                raise BadField(f"field '{name}' is not a list")
            return row[name]
    raise BadField("no field 'conversations', 'messages' or 'turns'")


def _turn(turn: Any) -> tuple[str | None, str]:
    """The role and text of a turn. The text is "" if it is empty or not text."""
    if not isinstance(turn, dict):
        return None, ""
    speaker = turn.get("from", turn.get("role"))
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    try:
        return role, text_field(turn, "value" if "value" in turn else "content").strip()
    except BadField:
        return role, ""


def _question(row: Mapping[str, Any]) -> Example:
    """A question of MT-bench. Raises BadField."""
    question_id, turns, reference = row.get("question_id"), row["turns"], row.get("reference")
    if not isinstance(question_id, int | str):
        raise BadField("no field 'question_id'")
    if not isinstance(turns, list) or not turns:
        raise BadField("field 'turns' is not a list of texts")
    first, *follow_ups = [text_field({"turns": turn}, "turns") for turn in turns]
    target: dict[str, Any] = {"question_id": question_id}
    if isinstance(reference, list) and all(isinstance(text, str) for text in reference):
        target["reference"] = reference
    tags = {"category": str(row["category"])} if row.get("category") else {}
    return Example(user_turn(first), None, target, tags, tuple(follow_ups), id=f"mt-bench-{question_id}")


def _is_question(row: Mapping[str, Any]) -> bool:
    return isinstance(row["target"], dict) and "question_id" in row["target"]


TASK = ShareGpt()
