"""cllm.scoring.numerals: one number, many spellings."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.scoring.numerals import plain_numbers, scaled_numbers


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("3 3/4 cups", "15/4 cups"),
        ("3¾ cups", "15/4 cups"),
        ("3 ¾", "15/4"),
        ("３¾", "15/4"),
        ("3 3⁄4", "15/4"),
        ("3³⁄₄", "15/4"),
        ("3 and 3/4", "15/4"),
        ("3 and a half", "7/2"),
        ("¾", "3/4"),
        (r"3\frac{3}{4}", "15/4"),
        (r"3\,\dfrac34", "15/4"),
        (r"-3 \tfrac{3}{4}", "-15/4"),
        (r"\frac34", "3/4"),
        (r"\frac3{4}", "3/4"),
        (r"\frac{-3}{4}", "-3/4"),
        (r"\left(\frac{3}{4}\right)", " (3/4 )"),
        ("3 * 3/4", "3 * 3/4"),
        ("3 5/4", "3 5/4"),
        ("3\n3/4", "3\n3/4"),
        ("12,34,567", "1234567"),
        ("1,234,567.5", "1234567.5"),
        ("1 234 567", "1234567"),
        ("1\u202f234", "1234"),
        ("1'234'567", "1234567"),
        ("1_234", "1234"),
        ("1.234.567", "1234567"),
        (r"1\,234\,567", "1234567"),
        (r"1{,}234{,}567", "1234567"),
        (r"3\,3/4", "15/4"),
        ("1, 234", "1, 234"),
        ("1,23", "1,23"),
        ("1.234", "1.234"),
        ("2 400-page books", "2 400-page books"),
        ("Rs.750", "$750"),
        ("Rs 750", "$750"),
        ("-INR 750", "-$750"),
        ("US$750", "$750"),
        (r"\text{Rs. }750", " $750"),
        ("hours 750", "hours 750"),
        ("2.5e3", "2500"),
        ("2.5E-1", "0.25"),
        ("2.5 x 10^3", "2500"),
        ("2.5×10³", "2500"),
        (r"2.5 \times 10^{3}", "2500"),
        (r"2.5 \cdot 10^{-1}", "0.25"),
        ("2.5*10**3", "2500"),
        ("**2.5 * 10^3**", "**2500**"),
        ("10⁴", "10000"),
        ("**10** 6 of", "**10** 6 of"),
        ("10^10^10", "10^10^10"),
        ("2e", "2e"),
        ("12e3f", "12e3f"),
        ("４２", "42"),
        ("٤٢", "42"),
        ("४२", "42"),
        ("＄４，２００．５", "$4200.5"),
        ("4 m²", "4 m^2"),
    ],
)
def test_spellings(written: str, plain: str) -> None:
    assert plain_numbers(written) == plain


@pytest.mark.parametrize(
    ("plain", "scaled"),
    [
        ("4 million", "4000000"),
        ("4.25 Million dollars", "4250000 dollars"),
        ("$4-million", "$4000000"),
        ("15/2 lakhs", "1500000/2"),
        ("3 crore", "30000000"),
        ("2 hundred thousand and some", "200000 and some"),
        ("0.5 trillion", "500000000000"),
        ("4 million 200", "4 million 200"),
        ("4 millionaires", "4 millionaires"),
        ("the 1234x million", "the 1234x million"),
        ("million", "million"),
        ("1" * 50 + " million", "1" * 50 + " million"),
    ],
)
def test_words_of_scale(plain: str, scaled: str) -> None:
    assert scaled_numbers(plain) == scaled


@given(st.integers(0, 10**12))
def test_any_thousands(number: int) -> None:
    for separator in ",_":
        assert plain_numbers(f"{number:{separator}}") == str(number)
    if number >= 1000:
        assert plain_numbers(f"{number:,}".replace(",", " ")) == str(number)


@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    assert isinstance(scaled_numbers(plain_numbers(text)), str)


@pytest.mark.parametrize(
    "piece", ["1,", "1 000 ", "1.111", "1'000", "10^", "10*", "1 and ", "1 1/", "½", "²", "\\frac{1}", "Rs", "1e", "\\text{"]
)
def test_long_texts_are_fast(piece: str) -> None:
    start = time.process_time()
    plain_numbers(piece * (100_000 // len(piece)))
    assert time.process_time() - start < 2
