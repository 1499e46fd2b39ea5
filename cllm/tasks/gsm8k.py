"""GSM8K: grade-school word problems with a worked answer that ends in ``#### number`` (Cobbe et al. 2021).

Two forms of rows are read: GSM8K's own, ``{question, answer}``, and the test form of the CLLM paper's evaluation,
``{question, target, source, tag}``, where ``target`` is the number alone.
"""

import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from cllm.tasks.base import BadField, BadRow, Example, HubDataset, NumberedRow, Task, text_field

_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
_SIGN = r"(?:(?<![\w.)\]}%])-(?=[$€£¥₹]?\.?[0-9]))?"  # a minus after a word, number or bracket is an operator
_VALUE = re.compile(rf"(?>({_SIGN})[$€£¥₹]?[ ]?({_SIGN})({_NUMBER})(/{_NUMBER})?)")
_GOLD = re.compile(rf"-?{_NUMBER}")
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_HASHES = re.compile(r"####([^\n]*)")
_HASHES_NUMBER = re.compile(rf"[\s$*=:]*{_VALUE.pattern}(?!\.[ \t]+\S)")  # not a heading such as "#### 2. Add up"
_ANSWER_IS = re.compile(r"\banswer is\b:?((?:[^\n.!?]|[.!?](?!\s|$))*)", re.IGNORECASE)
_NEXT_QUESTION = re.compile(r"\nQuestion\b")
_BOXED = re.compile(r"\\f?boxed\s*\{")
_SUM = re.compile(r"[-+*/(). 0-9]+")  # what math-verify is given; no powers: 9**9**9 would never end
_FRACTION = re.compile(rf"\\[dt]?frac\s*\{{\s*({_NUMBER})\s*\}}\s*\{{\s*({_NUMBER})\s*\}}")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?:[A-Za-z°%.]|\s)+$")
_PLAIN = str.maketrans({"−": "-", "–": "-", "×": "*", "÷": "/", "\u00a0": " ", "\u202f": " "})
_LATEX = {"{,}": ",", "\\,": "", "\\!": "", "\\;": " ", "\\ ": " ", "~": " ", "\\$": "$", "\\%": "%"}
_OPERATORS = {"\\times": "*", "\\cdot": "*", "\\div": "/"}
_LONGEST = 40  # characters of an answer; longer ones are no answers
_CLAUSE = 400  # characters looked at after "####", "answer is" or in a box
_BOXES = 8  # boxes looked at, from the last


class Gsm8k(Task):
    """Grade-school word problems; a reply is right when its final number is."""

    name = "gsm8k"
    description = "GSM8K: grade-school math word problems"
    fields = "question and answer, or question and target"
    metric = "accuracy"
    hub: ClassVar[HubDataset | None] = HubDataset("openai/gsm8k", "main", {"train": "train", "test": "test"})
    plain_template = "Question:\n{question}\nAnswer:\nLet's think step by step.\n"
    default_question = (
        "A bakery sells muffins in boxes of 6. On Monday it sold 14 boxes and on Tuesday 9 boxes. "
        "Each muffin costs $2. How much money did the bakery take in over the two days?"
    )

    def read(self, rows: Iterable[NumberedRow], split: str) -> Iterator[Example | BadRow]:
        for number, row in rows:
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                yield self._example(row, f"{self.name}-{split}-{number}")
            except BadField as error:
                yield BadRow(number, str(error))

    def _example(self, row: Mapping[str, Any], row_id: str) -> Example:
        question = text_field(row, "question").strip()
        reference = text_field(row, "answer").strip() if row.get("answer") is not None else None
        target = _target(row, reference)
        return Example(row_id, ({"role": "user", "content": question},), reference, target, _tags(row))

    def judgeable(self, example: Example) -> bool:
        return isinstance(example.target, str)

    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """``accuracy``: the final number of the reply equals the target, by math-verify (:func:`final_answer`).
        ``strict``: GSM8K's own rule; the first ``#### number`` of the reply is the target, letter for letter.
        """
        answer = final_answer(reply)
        return {
            "accuracy": answer is not None and equal_numbers(example.target, answer),
            "strict": _strict_answer(reply) == example.target,
        }


def _target(row: Mapping[str, Any], reference: str | None) -> str:
    """The number a row asks for, without commas. Raises BadField."""
    if row.get("target") is not None:
        target = _plain_number(row["target"]) or text_field(row, "target")
    elif reference is None:
        raise BadField("no field 'answer' or 'target'")
    elif "####" not in reference:
        raise BadField("answer without '####'")
    else:
        target = reference.rpartition("####")[2]
    target = target.strip().replace(",", "")
    if len(target) > _LONGEST or not _GOLD.fullmatch(target):
        raise BadField("target is not a number")
    return target


def _plain_number(value: Any) -> str | None:
    """A JSON number as text, 18.0 as 18; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    """``source`` and the entries of ``tag`` of the paper's test form, as text."""
    tags = {"source": str(row["source"])} if "source" in row else {}
    groups = row.get("tag")
    return tags | ({str(key): str(value) for key, value in groups.items()} if isinstance(groups, dict) else {})


def _strict_answer(reply: str) -> str | None:
    match = _STRICT.search(reply)
    return match[1].replace(",", "") if match else None


def final_answer(reply: str) -> str | None:
    r"""The final answer of a reply as a number or a short sum such as ``36/2``, or None when it has none.

    The first of these that the reply has, the last of its kind: ``#### 18``, ``\boxed{18}``, ``the answer is 18``,
    any number. Money signs, units, thousands commas and what follows the number are dropped; of an equation the
    right side counts. A reply that goes on with a next ``Question`` is cut there, as in the paper's evaluation.
    """
    reply = reply.translate(_PLAIN)
    for latex, plain in _LATEX.items():
        reply = reply.replace(latex, plain)
    start = _NEXT_QUESTION.search(reply)
    head = reply[: start.start()] if start else reply
    return _find_answer(head) or (_find_answer(reply) if start else None)


def _find_answer(reply: str) -> str | None:
    hashes = [text for text in _HASHES.findall(reply) if _HASHES_NUMBER.match(text)]
    clauses = hashes[-1:] or _last_boxed(reply) or _ANSWER_IS.findall(reply)[-1:]
    for clause in clauses:
        if answer := _value(clause[:_CLAUSE]):
            return answer
    numbers = list(_VALUE.finditer(reply))
    return _number(numbers[-1]) if numbers else None


def _value(clause: str) -> str | None:
    """The value that a short text states: a sum as it stands, or else the first number after the last ``=``."""
    side = _TEXT_COMMAND.sub(r" \1", clause.rpartition("=")[2])
    side = _FRACTION.sub(r"\1/\2", side)
    for latex, operator in _OPERATORS.items():
        side = side.replace(latex, operator)
    short = re.sub(r"[$,*]+$|^[$*]+", "", _UNIT.sub("", side.strip())).strip()
    bare = short.replace("$", "").replace(",", "")
    if _SUM.fullmatch(bare) and "**" not in bare and "//" not in bare and _balanced(short) and len(bare) <= _LONGEST:
        return bare
    match = _VALUE.search(side)
    return _number(match) if match else None


def _balanced(short: str) -> bool:
    """Whether its commas are thousands commas, and it has a digit."""
    return bool(re.search("[0-9]", short)) and "," not in re.sub(_NUMBER, "", short)


def _number(match: re.Match[str]) -> str | None:
    before, after, number, divisor = match.groups()
    text = ("-" if before or after else "") + (number + (divisor or "")).replace(",", "")
    return text if len(text) <= _LONGEST else None


def _last_boxed(reply: str) -> list[str]:
    r"""The content of the last closed, filled ``\boxed{...}`` in a list, or []."""
    for match in reversed(list(_BOXED.finditer(reply))[-_BOXES:]):
        depth = 1
        for end in range(match.end(), min(len(reply), match.end() + _CLAUSE)):
            depth += {"{": 1, "}": -1}.get(reply[end], 0)
            if depth == 0:
                content = reply[match.end() : end]
                if content.strip():
                    return [content]
                break
    return []


_LOCK = threading.Lock()


def equal_numbers(target: str, answer: str) -> bool:
    """Whether two numbers or short sums are equal, by math-verify, to six decimals.

    math-verify's timeouts use signals, which only the main thread has, so they are off. None is needed: what
    :func:`final_answer` returns is short and has no powers.
    """
    with _LOCK:
        verify = _math_verify()[1]
        return bool(verify(_parsed(target), _parsed(answer), timeout_seconds=None))


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    parse, _, config = _math_verify()
    return parse(text, [config], parsing_timeout=None)


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any, Any]:
    """math-verify's (parse, verify, extraction settings), imported when first needed: it takes half a second."""
    from math_verify import ExprExtractionConfig, parse, verify

    for module in ("math_verify.parser", "math_verify.grader"):  # each warns that timeouts are off
        logging.getLogger(module).setLevel(logging.ERROR)
    return parse, verify, ExprExtractionConfig()


TASK = Gsm8k()
