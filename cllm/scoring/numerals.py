r"""Numbers as people and models write them, to plain digits: ``2½``, ``2\frac12``, ``1,00,000``, ``Rs.500``, ``1.2 × 10⁶``."""

import re
import unicodedata
from decimal import Decimal

NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
CURRENCY = "$€£¥₩₽₺₴₦₱₫฿₪₡₿₹¢"
_RAISED = "⁰¹²³⁴-⁹"
_FRACTION_AHEAD = re.compile(rf"(?<=\d)(?=[¼-¾⅐-⅞]|[{_RAISED}]+[/⁄])")
_EXPONENT = re.compile(rf"(?<=[\w)\]}}°])[⁺⁻]?[{_RAISED}]++(?![/⁄])")
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_SIGNS = str.maketrans("−–‐‑×·⋅∙÷⁄٫٬’", "----****//.,'")
_LATEX = {"{,}": ",", "\\,": " ", "\\!": "", "\\:": " ", "\\;": " ", "\\ ": " ", "~": " ", "\\$": "$", "\\%": "%"}
_LATEX |= {"\\times": "*", "\\cdot": "*", "\\div": "/", "\\approx": "≈"}
_LAYOUT = re.compile(r"\\(?:left|right|quad|displaystyle)(?![A-Za-z])")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_CURRENCY_WORD = re.compile(
    r"(?<![A-Za-z])(?:(?:Rs|Re|Tk|INR|PKR|USD|EUR|GBP|RMB|CNY|JPY)\b\.?[ ]{0,2}(?=-?[0-9])|(?:US|AU|CA|HK|NZ|[ACRS])\$)",
    re.IGNORECASE,
)
_THOUSANDS = re.compile(
    r"""(?<![0-9])(?:
        (?<![0-9][.,]) (?: [0-9]{1,3}(?:,[0-9]{3})++ | [0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3} )
      | (?<![0-9][ ,.]) [1-9][0-9]{0,2}(?:[ ][0-9]{3})++ (?!/|-[A-Za-z])
      | [1-9][0-9]{0,2}(?: (?:'[0-9]{3})++ | (?:_[0-9]{3})++ | (?:\.[0-9]{3}){2,} )
    )(?![0-9])""",
    re.VERBOSE,
)
_POWER_OF_TEN = r"10(?:[ ]*\^[ ]*|(?<!\*\*10)\*\*)[({]?([-+]?[0-9]{1,2})[)}]?(?![0-9]|[ ]*[\^!]|\*\*[0-9(])"
_SCIENTIFIC = re.compile(
    rf"(?<![\w^])(?<![0-9][.,])(?:(?:({NUMBER})[ ]*[*x][ ]*)?{_POWER_OF_TEN}|({NUMBER})e([-+]?[0-9]{{1,2}})(?!\w))",
    re.IGNORECASE,
)
_ARGUMENT = rf"(?:\{{\s*(-?{NUMBER})\s*\}}|([0-9]))"
_LATEX_FRACTION = re.compile(rf"\\(?:[cdt]?frac|nicefrac|sfrac)\s*{_ARGUMENT}\s*{_ARGUMENT}")
_SPOKEN = {"half": "1/2", "third": "1/3", "quarter": "1/4"}
_SPOKEN_FRACTION = re.compile(rf"(?<=[0-9]) and (?:an?|one) ({'|'.join(_SPOKEN)})\b", re.IGNORECASE)
_SCALES = {"hundred": 2, "thousand": 3, "lakh": 5, "lac": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
_SCALED = re.compile(
    rf"(?<![\w.,/^])({NUMBER})(/{NUMBER})?((?:(?:[ ]{{1,3}}|-)(?:{'|'.join(_SCALES)})s?\b){{1,2}})(?![ -]?(?:and[ ])?[0-9])",
    re.IGNORECASE,
)
_MIXED = re.compile(r"(?<![\w.,/^])([0-9]{1,9})(?:[ ]{1,2}|[ ]and[ ]|[ ]?&[ ]?)([0-9]{1,4})[ ]?/[ ]?([0-9]{1,4})(?![0-9/]|\.[0-9])")


def plain_numbers(text: str) -> str:
    """The text with its numbers in ASCII digits: no thousands separators, powers of ten, mixed numbers or LaTeX fractions."""
    text = _FRACTION_AHEAD.sub(" ", text)
    text = _EXPONENT.sub(lambda match: "^" + match[0], text)
    text = _FOREIGN_DIGIT.sub(lambda match: str(int(match[0])), unicodedata.normalize("NFKC", text).translate(_SIGNS))
    for latex, plain in _LATEX.items():
        text = text.replace(latex, plain)
    text = _TEXT_COMMAND.sub(r" \1", _LAYOUT.sub(" ", text))
    text = _CURRENCY_WORD.sub("$", text)
    text = _THOUSANDS.sub(lambda match: re.sub(r"[^0-9]", "", match[0]), text)
    text = _SCIENTIFIC.sub(_written_out, text)
    text = _SPOKEN_FRACTION.sub(lambda match: " " + _SPOKEN[match[1].lower()], _LATEX_FRACTION.sub(_divided, text))
    return _MIXED.sub(_improper, text)


def scaled_numbers(text: str) -> str:
    """The text with words of scale multiplied into the plain numbers before them: ``1200000`` for ``1.2 million``."""
    return _SCALED.sub(_multiplied, text)


def _multiplied(match: re.Match[str]) -> str:
    power = sum(_SCALES[word.removesuffix("s")] for word in re.findall("[a-z]+", match[3].lower()))
    return format(Decimal(match[1]).scaleb(power), "f") + (match[2] or "") if len(match[1]) <= 20 else match[0]


def _written_out(match: re.Match[str]) -> str:
    factor = match[1] or match[3] or "1"
    return format(Decimal(factor).scaleb(int(match[2] or match[4])), "f") if len(factor) <= 20 else match[0]


def _divided(match: re.Match[str]) -> str:
    """``3/4``, with a space after a digit: ``2\\frac34`` is a mixed number."""
    numerator, denominator = match[1] or match[2], match[3] or match[4]
    space = " " if match.string[max(match.start() - 1, 0)].isdigit() else ""
    return f"{space}{numerator}/{denominator}"


def _improper(match: re.Match[str]) -> str:
    whole, numerator, denominator = map(int, match.groups())
    return f"{whole * denominator + numerator}/{denominator}" if numerator < denominator else match[0]
