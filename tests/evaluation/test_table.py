"""Tables: alignment and missing numbers."""

import pytest

from cllm.evaluation.table import format_table, number, percent, percent_with_interval, with_interval


def test_columns_line_up():
    text = format_table(["name", "tokens\nper second"], [["a", "1.0"], ["longer", "123.0"]])
    assert text.splitlines() == [
        "            tokens",
        "name    per second",
        "------  ----------",
        "a              1.0",
        "longer       123.0",
    ]


def test_a_short_row_is_refused():
    with pytest.raises(ValueError, match="a row has 1 cells, the header 2"):
        format_table(["a", "b"], [["x"]])


def test_numbers():
    assert (number(None), number(1.005, 1), percent(None), percent(0.256)) == ("-", "1.0", "-", "25.6%")
    assert with_interval(1.388, (1.31, 1.474)) == "1.39 [1.31, 1.47]"
    assert with_interval(1.388, None) == "1.39"
    assert percent_with_interval(0.25, (0.071, 0.5907)) == "25.0% [7.1, 59.1]"
    assert percent_with_interval(None, None) == "-"
