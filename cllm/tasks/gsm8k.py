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

from cllm.scoring.numerals import CURRENCY, NUMBER, plain_numbers, scaled_numbers
from cllm.scoring.reply import answer_candidates
from cllm.tasks.base import BadField, BadRow, Example, HubDataset, NumberedRow, Task, read_each, text_field

_SIGN = rf"(?:(?<![\w.)\]}}%])-(?=[{CURRENCY}]?\.?[0-9]))?"  # a minus after a word, number or bracket is an operator
_NO_EXPONENT = r"(?<![0-9^])(?<!\^[-{])"
_VALUE = re.compile(rf"(?>({_SIGN})[{CURRENCY}]?[ ]?({_SIGN}){_NO_EXPONENT}({NUMBER})(/{NUMBER})?)")
_GOLD = re.compile(rf"-?{NUMBER}")
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_HASHES = re.compile(r"####\s*+((?:(?!####)[^\n])*)")
_HASHES_NUMBER = re.compile(rf"[\s$*=:]*{_VALUE.pattern}")
_NUMBERED = re.compile(r"[\s*]*[0-9]+\**(?:\.?\)|[.:]\**[ \t]+\S|\.[A-Za-z]|[ \t]+[-—][ \t]+[A-Za-z])")
_BRACKETED = re.compile(r"[\s*]*[0-9]+\**\.?\)")
_SENTENCE = r"(?:[^\n.!?]|[.!?](?!\s|$))*"
_ROUGHLY = r"approx\.|(?:approx|approximately|about|around|roughly|just)\b"
_LEAD = rf"""(?:[\s*_`"'$(\[{{>:=≈\\]|[-—]\s|->|→|{_ROUGHLY}|[a-z]{{1,20}}\s*=)*+"""
_AT_ONCE = re.compile(rf"{_LEAD}(?P<sentence>{_VALUE.pattern}{_SENTENCE})", re.IGNORECASE)
_LATER = re.compile(rf":?(?P<sentence>{_SENTENCE})")
_ANSWER_IS = re.compile(
    r"(?P<is>\b(?:final\s+|correct\s+)?answers?(?:\s+(?:to|for|of)\b[^\n.!?:]{0,60}?)?\s+(?:is|are|equals|would\s+be|will\s+be)\b)"
    r"|\b(?:final|correct)\s+(?:answer|result)\b|<(?:final_?)?answer>",
    re.IGNORECASE,
)
_LABEL = re.compile(r"""\banswer\b["'*_]*\s*[:=]|\bans\b\s*[.:=-]|^[ #*_]*answer[ *_]*$""", re.IGNORECASE | re.MULTILINE)
_FEW_WORDS = re.compile(rf"{_VALUE.pattern}%?(?:[ ]?[*_A-Za-z°$]+){{0,2}}\s*")
_REMARK = re.compile(r"\s\([^()]*[A-Za-z][^()]*\)")
_BOXED = re.compile(rf"\\(?:f?boxed|fbox)\s*(?:\{{|(?P<bare>{_VALUE.pattern}))")
_SUM = re.compile(r"[-+*/(). 0-9]+")  # what math-verify is given; no powers: 9**9**9 would never end
_LATEX_SUM = re.compile(r"(?=.*\\)(?:[-+*/(). 0-9{}]|\\[cdt]?frac)+")
_UNIT = re.compile(r"(?:[A-Za-z°%.]|\s)+$")
_LONGEST = 40  # characters of an answer; longer ones are no answers
_CLAUSE = 400  # characters looked at after "####", "answer is" or in a box
_TRIES = 8  # boxes and the like looked at, from the last


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
        return read_each(rows, lambda row, number: [self._example(row, f"{self.name}-{split}-{number}")])

    def _example(self, row: Mapping[str, Any], row_id: str) -> Example:
        question = text_field(row, "question").strip()
        reference = text_field(row, "answer").strip() if row.get("answer") is not None else None
        target = _target(row, reference)
        return Example(row_id, ({"role": "user", "content": question},), reference, target, _tags(row))

    def judgeable(self, example: Example) -> bool:
        return isinstance(example.target, str)

    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """``accuracy``: the final number of the reply equals the target, by math-verify (:func:`final_answer`). ``4 million``
        is 4 or 4000000, since the question may ask for millions.
        ``strict``: GSM8K's own rule; the first ``#### number`` of the reply is the target, letter for letter.
        """
        answers = dict.fromkeys([final_answer(reply), final_answer(reply, scaled=True)])
        strict = next(filter(None, map(_strict_answer, answer_candidates(reply))), None)
        return {
            "accuracy": any(answer is not None and equal_numbers(example.target, answer) for answer in answers),
            "strict": strict == example.target,
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


def final_answer(reply: str, scaled: bool = False) -> str | None:
    r"""The final answer of a reply as a number or a short sum such as ``36/2``, or None when it has none.

    The first of these that the reply has, the last of its kind: ``#### 18``, ``\boxed{18}``, ``the answer is 18`` or
    ``Final answer: 18``, ``Answer: 18`` where no other number follows, any number. Money signs, units, thousands commas and
    what follows the number are dropped; of an equation the right side counts. ``scaled``: "million" and the like multiply it.
    """
    texts = map(plain_numbers, answer_candidates(reply))
    return next(filter(None, map(_find_answer, map(scaled_numbers, texts) if scaled else texts)), None)


def _find_answer(reply: str) -> str | None:
    for clause in _hashes(reply) or _last_boxed(reply) or _stated(reply) or _labelled(reply):
        if answer := _value(clause[:_CLAUSE]):
            return answer
    numbers = list(_VALUE.finditer(reply))
    return _number(numbers[-1]) if numbers else None


def _hashes(reply: str) -> list[str]:
    """What the last ``####`` with a number says, in a list, or []. Numbered headings such as ``#### 2) Sell them`` say none."""
    found = [match for match in _HASHES.finditer(reply) if _HASHES_NUMBER.match(match[1])]
    numbered = [match for match in found if _NUMBERED.match(match[1])]
    heading = _NUMBERED
    if len(numbered) == 1 and not reply[numbered[0].end() :].strip():
        heading = _BRACKETED  # nothing stands under "#### 18: that is all"
    return [match[1] for match in found if not heading.match(match[1])][-1:]


def _stated(reply: str) -> list[str]:
    """What the last "answer is" or "final answer" says, in a list, or []; one that starts with its value goes before others."""
    places = list(_ANSWER_IS.finditer(reply))[-_TRIES:]
    at_once = (_AT_ONCE.match(reply, place.end()) for place in reversed(places))
    later = (_LATER.match(reply, place.end()) for place in reversed(places) if place["is"])
    found = (match["sentence"] for match in (*at_once, *later) if match)
    return next(([sentence] for sentence in found if _VALUE.search(sentence)), [])


def _labelled(reply: str) -> list[str]:
    """What the last "Answer:" says, in a list, or []. Reasoning may follow it, and then a bare value alone is an answer."""
    for label in reversed(list(_LABEL.finditer(reply))[-_TRIES:]):
        match = _AT_ONCE.match(reply, label.end())
        if match and (_FEW_WORDS.fullmatch(match["sentence"]) or not _VALUE.search(reply, match.end())):
            return [match["sentence"]]
    return []


def _value(clause: str) -> str | None:
    """The value that a short text states: a sum as it stands, or else the first number after the last ``=``."""
    stated = _REMARK.sub("", clause)
    side = re.split("[=≈]", stated if _VALUE.search(stated) else clause)[-1]
    short = re.sub(r"[$,*]+$|^[$*]+", "", _UNIT.sub("", side.strip())).strip()
    bare = short.replace("$", "").replace(",", "")
    if _is_sum(bare) and _balanced(short):
        return bare
    match = _VALUE.search(side)
    return _number(match) if match else None


def _is_sum(bare: str) -> bool:
    readable = _SUM.fullmatch(bare) or _LATEX_SUM.fullmatch(bare)
    return bool(readable) and "**" not in bare and "//" not in bare and len(bare) <= _LONGEST


def _balanced(short: str) -> bool:
    """Whether it has a digit, and no comma."""
    return bool(re.search("[0-9]", short)) and "," not in short


def _number(match: re.Match[str]) -> str | None:
    before, after, number, divisor = match.groups()
    text = ("-" if before or after else "") + number + (divisor or "")
    return text if len(text) <= _LONGEST else None


def _last_boxed(reply: str) -> list[str]:
    r"""The content of the last closed, filled ``\boxed{...}`` in a list, or []; the number of ``\boxed 18``."""
    for match in reversed(list(_BOXED.finditer(reply))[-_TRIES:]):
        content = match["bare"] or _braced(reply, match.end())
        if content.strip():
            return [content]
    return []


def _braced(reply: str, start: int) -> str:
    """What stands from ``start`` up to the brace that closes it; "" where none does."""
    depth = 1
    for end in range(start, min(len(reply), start + _CLAUSE)):
        depth += {"{": 1, "}": -1}.get(reply[end], 0)
        if depth == 0:
            return reply[start:end]
    return ""


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
    parse, _, expression, latex = _math_verify()
    text, form = (f"${text}$", latex) if "\\" in text else (text, expression)
    return parse(text, [form], parsing_timeout=None)


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any, Any, Any]:
    """math-verify's (parse, verify, settings for sums, for LaTeX), imported when first needed: it takes half a second."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    for module in ("math_verify.parser", "math_verify.grader"):  # each warns that timeouts are off
        logging.getLogger(module).setLevel(logging.ERROR)
    return parse, verify, ExprExtractionConfig(), LatexExtractionConfig()


TASK = Gsm8k()
