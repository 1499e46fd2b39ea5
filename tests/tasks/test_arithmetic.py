"""cllm.tasks.arithmetic: problems that are different, deterministic and right."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.errors import UsageError
from cllm.tasks import arithmetic, get_task
from cllm.tasks.arithmetic import generate
from cllm.tasks.base import Example
from cllm.tasks.stories import STORIES, Sheet, Unfit

ROWS = generate(3500, seed=0)


def test_there_are_many_stories() -> None:
    assert len(STORIES) >= 25 and len(set(STORIES)) == len(STORIES)
    shapes = {re.sub(r"\d+", "0", row["question"]).split("0")[-1] for row in ROWS}  # how the question is put
    assert len(shapes) >= 25


def test_all_stories_are_told_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Counter[str] = Counter()
    new = arithmetic._new
    monkeypatch.setattr(arithmetic, "_new", lambda story, *rest: told.update([story.__name__]) or new(story, *rest))
    generate(3 * len(STORIES), seed=5)
    assert set(told.values()) == {3} and len(told) == len(STORIES)


def test_every_sum_in_every_answer_is_right() -> None:
    for row in ROWS:
        *lines, last = row["answer"].split("\n")
        assert 1 <= len(lines) <= 4
        for line in lines:
            sums = re.findall(r"([\d+*/ -]*\d) = \$?(\d+)", line)
            assert len(sums) == 1, line
            expression, value = sums[0]
            assert eval(expression) == int(value) > 0, line
        assert last == f"#### {value}"


def test_numbers_are_sane() -> None:
    for row in ROWS:
        numbers = [int(number) for number in re.findall(r"\d+", row["question"] + row["answer"])]
        assert min(numbers) >= 1 and max(numbers) < 100_000, row
        assert "{" not in row["question"] + row["answer"] and "  " not in row["question"] + row["answer"]


def test_every_number_asked_about_is_used() -> None:
    """No story draws numbers that its answer forgets: what the question gives, the answer works with."""
    for row in ROWS:
        given_numbers = set(re.findall(r"\d+", row["question"]))
        unused = given_numbers - set(re.findall(r"\d+", row["answer"]))
        assert unused <= {"2", "4"}, row


def test_answers_score_right_and_changed_ones_wrong() -> None:
    task = get_task("arithmetic")
    for item in task.read(enumerate(ROWS[:200], 1), "train"):
        assert isinstance(item, Example) and item.id.startswith("arithmetic-train-") and item.reference
        assert task.score(item.reference, item) == {"accuracy": True, "strict": True}
        assert task.score(f"{item.reference}1", item) == {"accuracy": False, "strict": False}


@given(st.integers(0, 2**40), st.integers(1, 40), st.integers(1, 40))
def test_same_seed_same_rows_and_fewer_are_the_start_of_more(seed: int, few: int, more: int) -> None:
    rows = generate(few + more, seed)
    assert rows[:few] == generate(few, seed)
    assert len({row["question"] for row in rows}) == len(rows)


def test_seed_zero_stays_what_it_is() -> None:
    assert generate(1, seed=0) == [
        {
            "question": "Hugo has 24 pencils, and Arjun has three times as many. How many pencils do Hugo and Arjun "
            "have together?",
            "answer": "Arjun has 3 * 24 = 72 pencils.\nTogether they have 24 + 72 = 96 pencils.\n#### 96",
        }
    ]


def test_held_out_problems_are_others() -> None:
    train = {row["question"] for row in ROWS}
    unguarded = {row["question"] for row in generate(500, seed=0)}
    assert unguarded <= train  # the same seed repeats itself, unless it is told not to
    for seed in (0, 1):
        assert not train & {row["question"] for row in generate(500, seed, exclude=train)}


def test_what_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, -3):
        with pytest.raises(UsageError, match=f">= 1, got {count}"):
            generate(count, seed=0)

    def only_one(_draw: object, sheet: Sheet) -> str:
        sheet.work("{sum}", 1, "+", 1)
        return "What is 1 + 1?"

    monkeypatch.setattr(arithmetic, "STORIES", (only_one,))
    assert generate(1, seed=0)[0]["answer"] == "1 + 1 = 2\n#### 2"
    with pytest.raises(UsageError, match="no new problem .*'only_one'; ask for fewer"):
        generate(2, seed=0)


def test_the_sheet_computes() -> None:
    sheet = Sheet()
    assert sheet.work("It is {cost}.", 40, "*", 25, "/", 100) == 10 == sheet.result
    assert sheet.work("Now {sum}.", 20, "-", 5, "+", 1) == 16
    assert sheet.lines == ["It is 40 * 25 / 100 = $10.", "Now 20 - 5 + 1 = 16."]
    for unfit in ((3, "-", 3), (3, "-", 9, "+", 20), (7, "/", 2)):
        with pytest.raises(Unfit):
            sheet.work("{sum}", *unfit)
    with pytest.raises(ValueError, match="different rank"):
        sheet.work("{sum}", 1, "+", 2, "*", 3)
    assert len(sheet.lines) == 2
