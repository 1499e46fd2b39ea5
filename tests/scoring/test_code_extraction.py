"""cllm.scoring.code_extraction: programs extracted from real and invented replies give the right results when run."""

import ast
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.scoring.code_extraction import completion, extract_program

PROMPT = '''from typing import List


def total(numbers: List[int]) -> int:
    """ Add up the numbers.
    >>> total([1, 2])
    3
    """
'''
DEFINITION = "def total(numbers: List[int]) -> int:\n    return sum(numbers)"
BODY = "    result = 0\n    for number in numbers:\n        result += number\n    return result"

LONGER = "def total(numbers):\n    result = 0\n    for number in numbers:\n        result += number\n    return result"
DOCUMENTED = '''def total(numbers):
    """Add up.

    ```python
    total([1, 2])
    ```
    """
    return sum(numbers)'''


def result_of(reply: str, prompt: str = PROMPT) -> int:
    names: dict = {"__name__": "solution"}
    exec(prompt + completion(reply, prompt, "total"), names)
    return names["total"]([1, 2, 3])


FOUND = {
    "definition": DEFINITION,
    "fence": f"```python\n{DEFINITION}\n```",
    "fence without a language": f"Sure!\n```\n{DEFINITION}\n```\nDone.",
    "tildes": f"~~~python\n{DEFINITION}\n~~~",
    "capital language": f"```Python\n{DEFINITION}\n```",
    "fence with attributes": f'```python title="a.py"\n{DEFINITION}\n```',
    "windows line ends": f"```python\n{DEFINITION}\n```".replace("\n", "\r\n"),
    "unclosed fence": f"Here:\n```python\n{DEFINITION}",
    "unopened fence": f"{DEFINITION}\n```\nThis code adds up.",
    "indented fence": "1. Like so:\n   ```python\n   " + DEFINITION.replace("\n", "\n   ") + "\n   ```",
    "prose before": f"Here is the function.\n\n{DEFINITION}",
    "prose from": f"from what you say, this follows:\n\n{DEFINITION}\n",
    "prose after": f"{DEFINITION}\n\nIt uses sum(), isn't it nice?",
    "prose between": f"import math\n\nNow the function:\n\n{DEFINITION}\n\nThat's it.",
    "shell before": f"```bash\npip install total\n```\n```python\n{DEFINITION}\n```",
    "example before": f"```python\nprint(total([1]))\n```\n\n```python\n{DEFINITION}\n```",
    "helper in another block": "```python\ndef add(a, b):\n    return a + b\n```\nand\n```python\n"
    "def total(numbers):\n    result = 0\n    for n in numbers:\n        result = add(result, n)\n    return result\n```",
    "prompt repeated first": f"```python\n{PROMPT}```\n\n```python\n{DEFINITION}\n```",
    "prompt repeated and completed": f"```python\n{PROMPT}{BODY}\n```",
    "two answers": f"```python\n{DEFINITION}\n```\nor, wrongly,\n```python\ndef total(numbers):\n    return 0\n```",
    "usage after": f"{DEFINITION}\n\nprint(total([1]))\nassert total([1]) == 2\nx = total(input())\nraise SystemExit",
    "main guard": f"{DEFINITION}\n\nif __name__ == '__main__':\n    raise SystemExit\n",
    "helper after": "def total(numbers):\n    return add(numbers)\n\ndef add(numbers):\n    return sum(numbers)\n",
    "cut off after": f"{DEFINITION}\n\ndef test():\n    assert total([1, 2",
    "cut off in a comment": f"{DEFINITION}\n    '''and then",
    "decorated": f"import functools\n\n@functools.wraps(sum)\n{DEFINITION}",
    "lambda": "total = lambda numbers: sum(numbers)",
    "future import": f"from __future__ import annotations\n{DEFINITION}",
    "constant before": "START = 0\n\ndef total(numbers):\n    return sum(numbers, START)\n",
    "constant in another block": "```python\nSTART = 0\n```\nand\n```python\ndef total(numbers):\n    return sum(numbers, START)\n```",
    "usage in another block": "```python\nx = total([1])\nx.sort()\nprint(x)\n```\n" + f"```python\n{DEFINITION}\n```",
    "table filled after": "def total(numbers):\n    return T[0](numbers)\n\nT = []\nT.append(sum)\nT.append(print(1))\n",
    "table filled by a loop after": "def total(numbers):\n    return T[0](numbers)\n\nT = {}\nfor n in range(2):\n"
    "    T[n] = sum\n\nfor n in T:\n    print(total(n))\n",
    "stub before": "```python\ndef total(numbers):\n    raise NotImplementedError('later')\n```\nNow in full:\n"
    f"```python\n{DEFINITION}\n```",
    "stub before in the same block": f"def total(numbers):\n    raise NotImplementedError\n\n{DEFINITION}",
    "thinking before": f"<think>\n```python\ndef total(numbers):\n    return 0\n```\nno\n</think>\n```python\n{DEFINITION}\n```",
    "thinking that the prompt began": f"def total(numbers):\n    return 0\n</think>\n{DEFINITION}",
    "special token": f"{DEFINITION}<|eot_id|>\n\ndef total(numbers):\n    return 0",
    "special tokens around": f"<|im_start|>assistant\n{DEFINITION}<|im_end|>",
    "turn of the user": f"{DEFINITION}\n<|im_start|>user\nThanks",
    "next question": f"{DEFINITION}\n\nProblem: Find the largest.\n\ndef total(numbers):\n    return max(numbers)",
    "fence closes on the code line": f"```python\n{LONGER}```",
    "fence closes on the code line after a string": "```python\ndef total(numbers):\n    found = {'a': sum(numbers)}\n"
    "    if not numbers:\n        return 0\n    return found['a'] if found else 'a'```",
    "fence closes on the code line before prose": f"```python\n{LONGER}``` It adds up.",
    "unopened fence closes on the code line": f"{LONGER}```\nIt adds up.",
    "fence opens on the code line": f"```python {LONGER}\n```",
    "fence opens after prose": f"Here you are: ```python\n{LONGER}\n```",
    "fence on one line": "```python def total(numbers): return sum(numbers)```",
    "fence on one line without a language": "```total = lambda numbers: sum(numbers)```",
    "fence in a sentence": "I would say ```py def total(numbers): return sum(numbers)``` for lists.",
    "fence in a docstring": f"```python\n{DOCUMENTED}\n```",
    "fence in a docstring of single quotes": f"```python\n{DOCUMENTED}\n```\nDone.".replace('"', "'"),
    "fence in a docstring without a fence": DOCUMENTED,
    "fence in a docstring and no line for the last": f"```python\n{DOCUMENTED}```",
    "fence as a string": f"```python\nFENCE = '```'\nOTHER = \"```python\"\n\n{LONGER}\n```",
    "docstring cut off before": f'```python\ndef total(numbers):\n    """Add\n```\nAgain:\n```python\n{DEFINITION}\n```',
    "docstring cut off before another": '```python\ndef total(numbers):\n    """Add\n```\nAgain:\n```python\n'
    'def total(numbers):\n    """Add."""\n    return sum(numbers)\n```',
    "docstring cut off before a fence in another": f'```python\ndef total(numbers):\n    """Add\n```\nAgain:\n```python\n{DOCUMENTED}\n```',
    "docstring cut off without a closing fence": f'```python\ndef add(a):\n    """Add\n\n```python\n{DOCUMENTED}\n```',
    "docstring of a module cut off": f'```python\n"""Sums of\n```\nIn full:\n```\n{DOCUMENTED}\n```',
    "docstring of single quotes cut off": "~~~\ndef total(numbers):\n    '''Add\n~~~\n~~~\n" + DOCUMENTED.replace('"', "'") + "\n~~~",
    "helper in a later block": "```python\ndef total(numbers):\n    return add(numbers)\n```\nThis needs\n```python\n"
    "def add(numbers):\n    return sum(numbers)\n\nprint(add([1]))\n```",
    "helpers in later blocks": "```python\nfrom __future__ import annotations\n\ndef total(numbers):\n"
    "    return Adder().add(numbers)\n```\nwhere\n```python\nclass Adder(Base):\n    def add(self, numbers):\n"
    "        return reduce(add, numbers, START)\n```\nwith\n```python\nfrom functools import reduce\n"
    "from operator import add\n\nSTART = 0\n\nclass Base:\n    pass\n```",
    "import in a later block": "```python\ndef total(numbers):\n    return int(math.fsum(numbers))\n```\nand\n```python\nimport math\n```",
    "body": BODY,
    "body and a special token": f"{BODY}<|endoftext|>def total(numbers):",
    "body and a turn": f"{BODY}\n\n### Instruction:\nThanks",
    "body in a fence on one line": "```python return sum(numbers)```",
    "body and a helper in a later block": "```python\n    return add(numbers)\n```\n```python\ndef add(numbers):\n"
    "    return sum(numbers)\n```",
    "body and more": f"{BODY}\n\n\ndef other():\n    pass\n\nprint(total([1]))",
    "body and prose": f"{BODY}\n\nThis function adds up.",
    "body whose first line lost its indentation": BODY.strip(),
    "body without indentation": "\n".join(line[4:] for line in BODY.split("\n")),
    "body in a fence": f"The body is:\n```python\n{BODY}\n```",
    "body in a fence without indentation": "```python\nreturn sum(numbers)\n```",
    "body and a closing fence": f"{BODY}\n```\nIt adds up.",
    "body by other spaces": "  return sum(numbers)".replace("  ", "    ") + "\n  \n",
}


@pytest.mark.parametrize("name", FOUND)
def test_program_is_found(name: str) -> None:
    assert result_of(FOUND[name]) == 6


# What SmolLM2-135M-Instruct said, greedily, to "Please generate code based on the following doc:" and a HumanEval prompt.
REAL = {
    ("HumanEval/23", True): "```python\ndef strlen(string: str) -> int:\n    return len(string)\n```\n\n"
    "This function uses Python's built-in `len` function to calculate the length of the input string.",
    (
        "HumanEval/28",
        True,
    ): "```python\ndef concatenate(strings: List[str]) -> str:\n    return ''.join(strings)\n```\n\n"
    "This function uses the `join()` method to concatenate the list of strings into a single string. The `''` is a "
    "special character in Python that represents a newline character.",
    ("HumanEval/53", True): "def add(x: int, y: int) -> int:\n    return x + y\n\n# Example usage:\n"
    "print(add(2, 3))  # Output: 5\nprint(add(5, 7))  # Output: 12\n```\n\nThis code uses the built-in `add` function from "
    "Python's built-in `math` module to add two numbers. The `x` and `y` arguments are passed to `add` to perform addition.",
    ("HumanEval/60", True): 'def sum_to_n(n: int) -> int:\n    """Return the sum of n numbers from 1 to n."""\n'
    "    return n * (n + 1) // 2\n\n### Instruction:\nGiven a non-empty list of integers, add all of them except the single "
    "number that appears only once.\n### Example:\nInput: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\nOutput:",
    (
        "HumanEval/34",
        False,
    ): "def unique(l: list) -> list:\n    return sorted(l, key=lambda x: x[1])\n\n# Example usage:\n"
    "print(unique([5, 3, 5, 2, 3, 3, 9, 0, 123]))  # Output: [0, 2, 3, 5, 9, 123]",
    ("HumanEval/45", False): '```\ndef triangle_area(a, h):\n    """Given length of a side and high return area for a '
    'triangle."""\n    return a * (h + 1) / 2\n```\n\nThe above code is a Python function that uses a function to calculate '
    "the area of a triangle based on the given parameters.",
}


@pytest.mark.parametrize(("task_id", "right"), REAL)
def test_real_replies(task_id: str, right: bool, shared_data: Path) -> None:
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        problem = next(p for p in map(json.loads, file) if p["task_id"] == task_id)
    names: dict = {}
    source = problem["prompt"] + completion(REAL[task_id, right], problem["prompt"], problem["entry_point"])
    exec(source + "\n" + problem["test"], names)
    try:
        names["check"](names[problem["entry_point"]])
        passed = True
    except (AssertionError, TypeError):
        passed = False
    assert passed == right
    assert "Example" not in source and "print(" not in source


# More of its replies: nothing in them is a solution.
@pytest.mark.parametrize(
    "reply",
    [
        "",
        "```\n\n```\n\n```\n",
        "```\n\nThis function uses Python's built-in `len()` function to calculate the length of the input string.",
        "Sure",
        "pass",
        "...",
        "I return it",
        "```\ndef total(numbers: list) -> list:\n    '''Return it.'''\n### Response:\n```\n",
        "\ndef total_list(strings: List[str]) -> str:\n    return ''.join(strings)\n",
        "```sql\nSELECT 1\n```",
        f"<think>\n{DEFINITION}",
        f"<think>\n```python\n{DEFINITION}\n```\n</think>",
        f"<|im_end|>{DEFINITION}",
    ],
)
def test_replies_without_a_program_give_none(reply: str) -> None:
    assert extract_program(reply, "total") is None
    assert completion(reply, PROMPT, "total") == reply


@pytest.mark.parametrize("name", [name for name in FOUND if "body" not in name])
def test_program_is_found_without_a_prompt(name: str) -> None:
    names: dict = {"List": list}
    exec(extract_program(FOUND[name], "total") or "", names)
    assert names["total"]([1, 2, 3]) == 6


def test_unneeded_later_blocks_are_left_out() -> None:
    reply = f"```python\n{DEFINITION}\n```\n```python\ndef other():\n    return 1\n```"
    assert extract_program(reply, "total") == DEFINITION


def test_program_alone_has_no_usage() -> None:
    assert extract_program(f"```python\n{DEFINITION}\n\nprint(total([]))\n```", "total") == DEFINITION


def test_a_prompt_without_a_docstring_is_completed() -> None:
    prompt = "def total(numbers):\n    # add up\n"
    assert result_of(DEFINITION.replace("List[int]", "list"), prompt) == 6
    assert result_of("    return sum(numbers)\n", prompt) == 6


@given(st.text(alphabet="`~ \n\tdefrtunpas():=#'\"\\total", max_size=80))
def test_no_reply_raises(reply: str) -> None:
    found = extract_program(reply, "total")
    assert found is None or ast.parse(found)
    assert isinstance(completion(reply, PROMPT, "total"), str)


@pytest.mark.parametrize("reply", ["(" * 5000, "def total(" * 500, "import os\n" * 5000, "x = 1\n" * 300 + "def total(\n"])
def test_long_nonsense_is_fast(reply: str) -> None:
    assert extract_program(reply, "total") is None


def test_canonical_solutions_survive_as_bodies_and_as_definitions(shared_data: Path) -> None:
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        for problem in map(json.loads, file):
            prompt, name, body = problem["prompt"], problem["entry_point"], problem["canonical_solution"]
            whole = ast.dump(ast.parse(prompt + body))
            assert ast.dump(ast.parse(prompt + completion(body, prompt, name))) == whole
            found = extract_program(f"Yes:\n```python\n{prompt}{body}```\nDone.", name)
            assert found is not None and ast.dump(ast.parse(found)) == whole
            found = extract_program(f"<think>No.</think>```python\n{prompt}{body.rstrip()}```<|im_end|>", name)
            assert found is not None and ast.dump(ast.parse(found)) == whole
