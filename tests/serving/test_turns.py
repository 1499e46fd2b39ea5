"""Splitting typed lines into turns."""

import pytest

from cllm.serving.turns import FIRST, MORE, turns


@pytest.mark.parametrize(
    ("lines", "expected", "prompts"),
    [
        ([], [], "1"),
        (["a", "", "b"], ["a", "", "b"], "1111"),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"], "12211"),
        (["a\\"], ["a"], "121"),
        (['"""a"""', "b"], ["a", "b"], "111"),
        (['"""', "a", "", "  b\\", '"""', "c"], ["a\n\n  b\\", "c"], "122221"),
        (['  """a', 'b"""  '], ["a\nb"], "121"),
        (['"""', "a"], ["a"], "1221"),
        (['""""""'], [""], "11"),
        (['"""'], [""], "121"),
        (['say """a', "b"], ['say """a', "b"], "111"),
    ],
    ids=repr,
)
def test_turns(lines: list[str], expected: list[str], prompts: str) -> None:
    asked, waiting = "", list(lines)

    def read(prompt: str) -> str:
        nonlocal asked
        asked += {FIRST: "1", MORE: "2"}[prompt]
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    assert list(turns(read)) == expected
    assert asked.startswith(prompts) and set(asked[len(prompts) :]) <= {"1"}
