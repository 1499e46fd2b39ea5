"""Single-answer grading by a language model at an OpenAI-compatible endpoint (MT-bench: Zheng et al. 2023, 3.1).

Each judgment is appended to a JSONL file in FastChat's form (``fastchat.llm_judge.show_result`` reads it). Judgments already
there, by the same judge of the same text, are not requested again.
"""

import argparse
import hashlib
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cllm.errors import UsageError
from cllm.files import append_jsonl, read_jsonl_tolerant, read_rows
from cllm.scoring.endpoint import Endpoint, Refused
from cllm.scoring.score import parse_score
from cllm.tasks.base import Review

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
DEFAULT_URL = "https://api.openai.com/v1"
OWN = "own"  # this project's prompts
NO_SCORE = -1  # FastChat's mark for a judgment without a score
JUDGED_TURNS = 2  # there are prompts for the first and the second turn
_KINDS = tuple(itertools.product((1, 2), (False, True)))  # of prompts: turn, whether there is a reference
_PLACE = re.compile(r"\{(\w+)\}")
_FIELDS = (
    {"question", "answer", "ref_answer_1"},
    {"question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2"},
)


@dataclass(frozen=True)
class Case:
    """A conversation to grade: as many answers as questions, and references for the first turns or none."""

    question_id: int | str
    category: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class JudgePrompt:
    """``template`` has placeholders such as ``{question}`` and ``{answer}``."""

    name: str
    system: str
    template: str

    def fill(self, fields: Mapping[str, str]) -> str:
        return _PLACE.sub(lambda match: fields[match[1]], self.template)


def prompt_name(turn: int, with_reference: bool) -> str:
    """The name of one of FastChat's single-answer prompts."""
    return f"single{'-math' if with_reference else ''}-v1{'-multi-turn' if turn == 2 else ''}"


_TASK = (
    "You grade the answer of an AI assistant. Judge whether it is correct, complete, clear, and does what the user "
    "asked; length alone earns nothing.{extra} Explain your judgment in a few sentences. Then close with a line of the "
    "form Rating: [[n]], where n is a number from 1 (worst) to 10 (best)."
)
_REFERENCE = " A reference answer is given: compare with it first, and name every mistake."
_SECOND = " The conversation has two questions; grade the answer to the second one."
_QUESTION, _REF, _ANSWER = "## Question{n}\n{{{q}}}\n", "## Reference answer{n}\n{{{r}}}\n", "## Answer{n}\n{{{a}}}\n"


def own_prompts() -> dict[str, JudgePrompt]:
    """This project's prompts, under FastChat's names. To compare with published figures, use FastChat's own prompts."""
    prompts = {}
    for turn, with_reference in _KINDS:
        parts = []
        for n in range(1, turn + 1):
            tail, number = (f"_{n}", f" {n}") if turn == 2 else ("", "")
            parts.append(_QUESTION.format(n=number, q="question" + tail))
            if with_reference:
                parts.append(_REF.format(n=number, r=f"ref_answer_{n}"))
            parts.append(_ANSWER.format(n=number, a="answer" + tail))
        extra = _REFERENCE * with_reference + _SECOND * (turn == 2)
        name = prompt_name(turn, with_reference)
        prompts[name] = JudgePrompt(name, _TASK.format(extra=extra), "\n".join(parts))
    return prompts


def read_prompts(path: str) -> dict[str, JudgePrompt]:
    """The four single-answer prompts of a ``judge_prompts.jsonl``. Raises UsageError if one is missing or unusable."""
    found = {}
    for _, row in read_rows(path):
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("name", "prompt_template")):
            found[row["name"]] = JudgePrompt(row["name"], str(row.get("system_prompt") or ""), row["prompt_template"])
    prompts = {}
    for turn, with_reference in _KINDS:
        name = prompt_name(turn, with_reference)
        if name not in found:
            raise UsageError(f"{path} has no prompt called {name}; found {', '.join(found) or 'none'}")
        known = {field for field in _FIELDS[turn - 1] if with_reference or "ref_" not in field}
        if unknown := set(_PLACE.findall(found[name].template)) - known:
            unknown_names, known_names = (", ".join(sorted(names)) for names in (unknown, known))
            raise UsageError(f"{path}: the prompt {name} has unknown placeholders: {unknown_names}; known are {known_names}")
        prompts[name] = found[name]
    return prompts


def read_references(path: str) -> dict[str, tuple[str, ...]]:
    """Question id -> reference answers by turn, from an answer file in FastChat's form."""
    references = {}
    for _, row in read_rows(path):
        try:
            turns = tuple(row["choices"][0]["turns"])  # type: ignore[index]
            if all(isinstance(text, str) for text in turns):
                references[str(row["question_id"])] = turns  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            continue
    if not references:
        raise UsageError(f"{path} has no answers: expected rows with question_id and choices: [{{turns: [...]}}]")
    return references


@dataclass(frozen=True)
class Request:
    """One turn of one case, as sent to the judge."""

    case: Case
    turn: int  # from 1
    prompt: JudgePrompt
    text: str
    key: str  # identifies judge, prompt and text


@dataclass
class Judge:
    """Grades cases. ``references``: question id -> answers, used instead of each case's own; None for those."""

    endpoint: Endpoint
    prompts: Mapping[str, JudgePrompt] = field(default_factory=own_prompts)
    references: Mapping[str, tuple[str, ...]] | None = None
    parallel: int = 4
    prompts_from: str = OWN

    @property
    def facts(self) -> dict[str, str]:
        """Who judges, and with which prompts."""
        return {"judge_model": self.endpoint.model, "judge_prompts": self.prompts_from}

    def review(self, cases: Sequence[Case], model_id: str, path: Path) -> Review:
        """Grade what is not yet in ``path``, and return mean scores by category and turn.

        Raises UsageError if the endpoint cannot be used or does not answer; judgments made by then are in ``path``.
        """
        requests = [request for case in cases for request in self.requests(case)]
        done = {row.get("key"): row for row in read_jsonl_tolerant(path) if row.get("score", NO_SCORE) != NO_SCORE}
        missing = [request for request in requests if request.key not in done]
        if kept := len(requests) - len(missing):
            logger.info("%d of %d judgments are there already, in %s", kept, len(requests), path)
        for row in tqdm(self._judge(missing, model_id), total=len(missing), desc="judged", disable=None):
            append_jsonl(path, [row])
            done[row["key"]] = row
        scores = {request.key: done[request.key]["score"] for request in requests}
        unclear = sum(score == NO_SCORE for score in scores.values())
        if unclear:
            logger.warning("%d of %d judgments have no readable score; see %s", unclear, len(scores), path)
        return summarise(requests, scores)

    def requests(self, case: Case) -> Iterator[Request]:
        references = case.references if self.references is None else self.references.get(str(case.question_id), ())
        for turn in range(1, min(len(case.questions), JUDGED_TURNS) + 1):
            complete = len(references) >= turn and all(text.strip() for text in references[:turn])
            prompt = self.prompts[prompt_name(turn, complete)]
            text = prompt.fill(_fields(case, turn, references if complete else ()))
            content = json.dumps([self.endpoint.model, prompt.name, prompt.system, text])
            key = hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()[:32]
            yield Request(case, turn, prompt, text, key)

    def _judge(self, requests: Iterable[Request], model_id: str) -> Iterator[dict[str, Any]]:
        """Judgments as they arrive. When one fails, those under way still finish; then its error is raised."""
        pool = ThreadPoolExecutor(max_workers=self.parallel)
        failure = None
        try:
            futures = [pool.submit(self._ask, request, model_id) for request in requests]
            for future in as_completed(futures):
                try:
                    row = future.result()
                except (UsageError, CancelledError) as error:
                    failure = failure or error
                    for other in futures:
                        other.cancel()
                else:
                    yield row
        finally:
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure

    def _ask(self, request: Request, model_id: str) -> dict[str, Any]:
        system = [{"role": "system", "content": request.prompt.system}] if request.prompt.system else []
        try:
            judgment = self.endpoint.complete([*system, {"role": "user", "content": request.text}])
            score = parse_score(judgment)
        except Refused as error:
            judgment, score = f"refused: {error}", None
        return {
            "question_id": request.case.question_id,
            "model": model_id,
            "judge": [self.endpoint.model, request.prompt.name],
            "user_prompt": request.text,
            "judgment": judgment,
            "score": NO_SCORE if score is None else score,
            "turn": request.turn,
            "tstamp": time.time(),
            "key": request.key,
        }


def _fields(case: Case, turn: int, references: Sequence[str]) -> dict[str, str]:
    if turn == 1:
        fields = {"question": case.questions[0], "answer": case.answers[0]}
    else:
        fields = {f"question_{n}": text for n, text in enumerate(case.questions[:2], 1)}
        fields |= {f"answer_{n}": text for n, text in enumerate(case.answers[:2], 1)}
    return fields | {f"ref_answer_{n}": text for n, text in enumerate(references[:turn], 1)}


def summarise(requests: Sequence[Request], scores: Mapping[str, float]) -> Review:
    """Mean scores of all cases and of each category, by turn. Judgments without a score are counted but left out."""
    groups: dict[str, list[Request]] = {"judge: all": list(requests)}
    for request in requests:
        groups.setdefault(request.case.category or "no category", []).append(request)
    return {title: _means(group, scores) for title, group in groups.items()}


def _means(requests: Sequence[Request], scores: Mapping[str, float]) -> dict[str, float | None]:
    by_turn: dict[int, list[float]] = {}
    for request in requests:
        if scores[request.key] != NO_SCORE:
            by_turn.setdefault(request.turn, []).append(scores[request.key])
    valid = [score for turn in by_turn.values() for score in turn]
    turns = {f"turn {turn}": _mean(by_turn.get(turn, [])) for turn in sorted({r.turn for r in requests})}
    return turns | {"mean": _mean(valid), "judged": len(valid), "no score": len(requests) - len(valid)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def add_options(options: argparse.ArgumentParser) -> None:
    """The judge's command-line options."""
    options.add_argument("--judge_model", help="grade the answers with this model at an OpenAI-compatible endpoint")
    options.add_argument("--judge_base_url", help=f"the endpoint; default: {DEFAULT_URL}; the key is read from ${KEY_VARIABLE}")
    options.add_argument("--judge_prompts", metavar="FILE", help="FastChat's judge_prompts.jsonl; default: this project's short prompts")
    options.add_argument(
        "--judge_references",
        metavar="FILE",
        help="reference answers, such as FastChat's reference_answer/gpt-4.jsonl; default: those in the questions",
    )
    options.add_argument("--judge_parallel", type=int, default=4, help="concurrent requests")


def configured(args: argparse.Namespace) -> Judge | None:
    """The judge that the options ask for; None without ``--judge_model``. Raises UsageError for options that do not fit."""
    if args.judge_model is None:
        given = [name for name in ("base_url", "prompts", "references") if getattr(args, f"judge_{name}") is not None]
        if given:
            raise UsageError(f"--judge_{given[0]} needs --judge_model")
        return None
    if args.judge_parallel < 1:
        raise UsageError(f"--judge_parallel must be >= 1, got {args.judge_parallel}")
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{KEY_VARIABLE} must be printable ASCII, but has other characters")
    if args.judge_base_url is None and not key:
        raise UsageError(f"the judge at {DEFAULT_URL} needs a key; set {KEY_VARIABLE}, or pass --judge_base_url")
    return Judge(
        Endpoint(args.judge_base_url or DEFAULT_URL, args.judge_model, key),
        read_prompts(args.judge_prompts) if args.judge_prompts else own_prompts(),
        read_references(args.judge_references) if args.judge_references else None,
        args.judge_parallel,
        Path(args.judge_prompts).name if args.judge_prompts else OWN,
    )
