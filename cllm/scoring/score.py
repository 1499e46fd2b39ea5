"""Parsing the score in a judge's text, in whatever form the judge wrote it."""

import re

LOWEST, HIGHEST = 0.0, 10.0
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER = rf"(?<![\d.,-])([0-9]+(?:[.,][0-9]+)?|\b(?:{'|'.join(_WORDS)})\b)(?![\d])"
_OF_TEN = r"(?:\s*(?:/|(?:out\s+)?of)\s*10(?:[.,]0+)?\b)"
_OTHER_SCALE = r"(?!\s*(?:/|(?:out\s+)?of)\s*[0-9]|\s*(?:to|[-\u2013\u2014])\s*[0-9]|\s*%)"  # 80/100, 3 of 5, 1 to 10
_VALUE = rf"{_NUMBER}(?:{_OF_TEN}|{_OTHER_SCALE})"
_LABEL = r"(?:rating|score|grade)"
_DIGITS_ONLY = _VALUE.replace(rf"|\b(?:{'|'.join(_WORDS)})\b", "")
_FORMS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\[\[\s*(?:{_LABEL}\s*[:=]?\s*)?{_VALUE}\s*\]\]",  # [[8]], [[8.5]], [[Rating: 8/10]]
        # **Rating:** 8, "score": 8, a rating of 8, Rating: [8]
        rf"\b{_LABEL}\b(?:\s+(?:is|of|as))?[\s:=*_\"'`(\[\u2013-]{{0,12}}{_VALUE}",
        rf"(?<!\w)\[\s*{_VALUE}\s*\]\W*\Z",  # [8] at the end; elsewhere it is a footnote or an index
        rf"{_NUMBER}{_OF_TEN}",  # 8/10, eight out of 10
        rf"\A[\s*_\"'`(]*{_DIGITS_ONLY}[\s*_\"'`).]*\Z",  # the number alone
    )
)


def parse_score(text: str) -> float | None:
    """The score from 0 to 10 in a judgment, or None.

    Forms are tried from the strictest to the loosest. Of several matches of one form the last counts, since a judge may
    mention the scale or the first turn before concluding.
    """
    for form in _FORMS:
        for match in reversed(list(form.finditer(text))):
            score = _value(match[1])
            if LOWEST <= score <= HIGHEST:
                return score
    return None


def _value(text: str) -> float:
    word = text.lower()
    return float(_WORDS.index(word)) if word in _WORDS else float(text.replace(",", "."))
