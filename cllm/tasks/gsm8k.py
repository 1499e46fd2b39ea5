"""GSM8K: grade-school word problems with a worked answer that ends in ``#### number`` (Cobbe et al. 2021).

Rows have one of two forms: GSM8K's own, ``{question, answer}``, and that of the CLLM paper's test file,
``{question, target, source, tag}``, where ``target`` is only the number.
"""

import logging
import re
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

from cllm.scoring.numerals import CURRENCY, NUMBER, plain_numbers, scaled_numbers
from cllm.scoring.reply import answer_candidates
from cllm.tasks.base import BadField, Example, HubDataset, Task, text_field, user_turn

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
_SUM = re.compile(r"[-+*/(). 0-9]+")  # the input of math-verify; no powers, as 9**9**9 would never end
_LATEX_SUM = re.compile(r"(?=.*\\)(?:[-+*/(). 0-9{}]|\\[cdt]?frac)+")
_UNIT = re.compile(r"(?:[A-Za-z°%.]|\s)+$")
_LONGEST = 40  # characters of an answer; anything longer is not one
_CLAUSE = 400  # characters searched after "####", "answer is" or in a box
_TRIES = 8  # boxes and the like to search, from the last


class Gsm8k(Task):
    """Grade-school word problems. A reply is right if its final number is."""

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

    def example(self, row: Mapping[str, Any]) -> Example:
        question = text_field(row, "question").strip()
        reference = text_field(row, "answer").strip() if row.get("answer") is not None else None
        return Example(user_turn(question), reference, _target(row, reference), _tags(row))

    def judgeable(self, example: Example) -> bool:
        return isinstance(example.target, str)

    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """``accuracy``: the reply's final number (:func:`final_answer`) equals the target, by math-verify. ``4 million`` counts
        as 4 and as 4000000, since the question may ask for millions.
        ``strict``: GSM8K's own rule: the first ``#### number`` of the reply is the target, character for character.
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
    """A JSON number as text, with 18.0 as 18; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    """``source`` and the entries of ``tag`` in the paper's test file, as text."""
    tags = {"source": str(row["source"])} if "source" in row else {}
    groups = row.get("tag")
    return tags | ({str(key): str(value) for key, value in groups.items()} if isinstance(groups, dict) else {})


def _strict_answer(reply: str) -> str | None:
    match = _STRICT.search(reply)
    return match[1].replace(",", "") if match else None


def final_answer(reply: str, scaled: bool = False) -> str | None:
    r"""The final answer of a reply, a number or a short sum such as ``36/2``, or None if there is none.

    These forms are tried in order, and the last match of the first form found counts: ``#### 18``, ``\boxed{18}``,
    ``the answer is 18`` or ``Final answer: 18``, ``Answer: 18`` with no other number after it, any number. Currency signs, units,
    thousands separators and text after the number are dropped; of an equation, the right side counts. ``scaled``: "million"
    and the like multiply the number.
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
    """The text after the last ``####`` with a number, in a list, or []. Headings such as ``#### 2) Sell them`` do not count."""
    found = [match for match in _HASHES.finditer(reply) if _HASHES_NUMBER.match(match[1])]
    numbered = [match for match in found if _NUMBERED.match(match[1])]
    heading = _NUMBERED
    if len(numbered) == 1 and not reply[numbered[0].end() :].strip():
        heading = _BRACKETED  # "#### 18: that is all" with nothing below it is an answer
    return [match[1] for match in found if not heading.match(match[1])][-1:]


def _stated(reply: str) -> list[str]:
    """The text after the last "answer is" or "final answer", in a list, or []. Those directly followed by a value come first."""
    places = list(_ANSWER_IS.finditer(reply))[-_TRIES:]
    at_once = (_AT_ONCE.match(reply, place.end()) for place in reversed(places))
    later = (_LATER.match(reply, place.end()) for place in reversed(places) if place["is"])
    found = (match["sentence"] for match in (*at_once, *later) if match)
    return next(([sentence] for sentence in found if _VALUE.search(sentence)), [])


def _labelled(reply: str) -> list[str]:
    """The text after the last "Answer:", in a list, or []. If more numbers follow it, it must be a bare value."""
    for label in reversed(list(_LABEL.finditer(reply))[-_TRIES:]):
        match = _AT_ONCE.match(reply, label.end())
        if match and (_FEW_WORDS.fullmatch(match["sentence"]) or not _VALUE.search(reply, match.end())):
            return [match["sentence"]]
    return []


def _value(clause: str) -> str | None:
    """The value in a short text: the whole text if it is a sum, else the first number after the last ``=``."""
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
    """Whether the text has a digit and no comma."""
    return bool(re.search("[0-9]", short)) and "," not in short


def _number(match: re.Match[str]) -> str | None:
    before, after, number, divisor = match.groups()
    text = ("-" if before or after else "") + number + (divisor or "")
    return text if len(text) <= _LONGEST else None


def _last_boxed(reply: str) -> list[str]:
    r"""What the last ``\boxed{...}`` holds, in a list; [] if none is closed and filled. ``\boxed 18`` holds its number."""
    for match in reversed(list(_BOXED.finditer(reply))[-_TRIES:]):
        content = match["bare"] or _braced(reply, match.end())
        if content.strip():
            return [content]
    return []


def _braced(reply: str, start: int) -> str:
    """The text from ``start`` to the closing brace; "" if there is none."""
    depth = 1
    for end in range(start, min(len(reply), start + _CLAUSE)):
        depth += {"{": 1, "}": -1}.get(reply[end], 0)
        if depth == 0:
            return reply[start:end]
    return ""


_LOCK = threading.Lock()


def equal_numbers(target: str, answer: str) -> bool:
    """Whether two numbers or short sums are equal to six decimals, by math-verify.

    math-verify's timeouts need signals, which only the main thread receives, so they are off. They are not needed:
    :func:`final_answer` returns short texts without powers.
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
    """math-verify's (parse, verify, settings for sums, settings for LaTeX). Importing it takes half a second, so do it late."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    for module in ("math_verify.parser", "math_verify.grader"):  # each warns that timeouts are off
        logging.getLogger(module).setLevel(logging.ERROR)
    return parse, verify, ExprExtractionConfig(), LatexExtractionConfig()


TASK = Gsm8k()
