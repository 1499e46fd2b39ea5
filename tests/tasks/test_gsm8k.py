"""cllm.tasks.gsm8k: both forms of rows, and scores that are right, quick and never hang."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.tasks import get_task
from cllm.tasks.base import BadRow, Example, user_turn
from cllm.tasks.gsm8k import equal_numbers, final_answer
from cllm.tasks.source import load_examples

GSM8K = get_task("gsm8k")


def example(target: str) -> Example:
    return Example(user_turn("?"), None, target)


def read(row: dict[str, Any]) -> Example | BadRow:
    return next(iter(GSM8K.read([(1, row)], "test")))


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("#### 18", "18"),
        ("####18", "18"),
        ("so 3 and 4\n#### 18.", "18"),
        ("#### $1,234.50 dollars", "1234.50"),
        ("#### **-10**", "-10"),
        ("#### 6 * 3 = 18", "18"),
        ("#### 2. Add up\n5 + 2 = 7 apples.", "7"),
        ("#### 5\nThat is more than 3.", "5"),
        ("#### 1\n#### 2", "2"),
        (r"\boxed{18} and 5", "18"),
        (r"So $\boxed{\$1,234.50}$.", "1234.50"),
        (r"$\boxed{18\text{ dollars}}$", "18"),
        (r"\[\boxed{x = 18}\]", "18"),
        (r"\boxed{\frac{36}{2}}", "36/2"),
        (r"\boxed{-\dfrac{1}{2}}", "-1/2"),
        (r"\boxed{3 \times 6}", "3 * 6"),
        (r"\boxed{18\%}", "18"),
        (r"\boxed{18 m^2}", "18"),
        (r"\boxed{} \boxed{18} \boxed{", "18"),
        (r"\boxed{1{,}234}", "1234"),
        ("The answer is 18.", "18"),
        ("The answer is: **$18** for 5 days. Well done.", "18"),
        ("So the answer is 5 + 13 = 18 eggs", "18"),
        ("The answer is clear.\nIt is 18", "18"),
        ("16 - 3 = 13\n13 * 2 = $26 in all", "26"),
        ("It costs 18$.", "18"),
        ("$$ 18 $$", "18"),
        ("about 3.5 miles.", "3.5"),
        ("it is .5", ".5"),
        ("He owes -$5.", "-5"),
        ("It is $-5", "-5"),
        ("It is \u22125 degrees", "-5"),
        ("10-3", "3"),
        ("- 18 eggs", "18"),
        ("12,000,000 yen", "12000000"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("\u20ac20", "20"),
        ("50%", "50"),
        ("1/2 of it", "1/2"),
        ("**18**", "18"),
        ("18 eggs.\nQuestion: What is 5?", "18"),
        ("Well.\nQuestion: How many?\nAnswer: 18", "18"),
        ("", None),
        ("no number", None),
        (r"\boxed{}", None),
        ("9" * 5000, None),
        ("the value is 9 " + "9" * 5000, None),
    ],
)
def test_final_answer(reply: str, answer: str | None) -> None:
    assert final_answer(reply) == answer


@pytest.mark.parametrize(
    ("target", "answer", "same"),
    [
        ("18", "18.00", True),
        ("18", "36/2", True),
        ("18", "3 * 6", True),
        ("0.5", "1/2", True),
        ("0.5", ".5", True),
        ("-10", "-10", True),
        ("-10", "10", False),
        ("18", "19", False),
        ("18", "18.01", False),
        ("0.333333", "1/3", True),
        ("18", "5/0", False),
        ("18", "(((3)", False),
        ("1000000", "1000001", False),
        ("12345678901234567890", "12345678901234567891", False),
    ],
)
def test_equal_numbers(target: str, answer: str, same: bool) -> None:
    assert equal_numbers(target, answer) is same


@pytest.mark.parametrize(
    ("reply", "accuracy", "strict"),
    [
        ("#### 1234", True, True),
        ("#### 1,234", True, True),
        ("x\n#### 1234 eggs", True, True),
        ("####1234", True, False),
        ("#### 1234.", True, False),
        ("#### $1234", True, False),
        ("It is 1234", True, False),
        ("#### 1\n#### 1234", True, False),
        ("#### 1234\n#### 1", False, True),
        ("<think>\n#### 1\n</think>\n#### 1234", True, True),
        ("<think>\n#### 1234\n</think>\n#### 1", False, False),
        ("<think>\n#### 1234", False, False),
        ("#### 1234<|im_end|>\n#### 1", True, True),
        ("#### 1235", False, False),
        ("", False, False),
    ],
)
def test_score(reply: str, accuracy: bool, strict: bool) -> None:
    assert GSM8K.score(reply, example("1234")) == {"accuracy": accuracy, "strict": strict}


SCALED = {
    "The film earned $2.4 million.": ("2.4", "2400000"),
    "That makes 7 billion miles": ("7", "7000000000"),
    "So \\boxed{3.5 \\text{ million}} people": ("3.5", "3500000"),
    "The answer is ₹1½ lakh.": ("1.5", "150000"),
    "#### 5 hundred thousand": ("5", "500000"),
    "He owes 2 and a half million": ("2.5", "2500000"),
    "There are 3 millionaires": ("3",),
}


@pytest.mark.parametrize("reply", SCALED)
def test_a_word_of_scale_belongs_to_the_number_or_to_the_question(reply: str) -> None:
    for target in (*chain(*SCALED.values()), "3000000"):
        assert GSM8K.score(reply, example(target))["accuracy"] == (target in SCALED[reply])


@pytest.mark.parametrize(
    ("reply", "target"),
    [
        ("<think>\nPerhaps #### 31, perhaps \\boxed{32}.\n</think>\nThe answer is 42.", "42"),
        ("Maybe 31.\n</think>\n\n\\boxed{42}", "42"),
        ("<thinking>31</thinking>So 42 pears.<|eot_id|>31", "42"),
        ("She has 42 pears.</s>31", "42"),
        ("#### 42\n<|im_end|>\n<|im_start|>user\n#### 31", "42"),
        ("#### 42\n\nQ: Kim has 9 caps.\nA: 9 + 22 = 31\n#### 31", "42"),
        ("6 * 7 = 42 pears\n\nProblem: Kim has 9 caps.\nSolution: 31\n#### 31", "42"),
        ("\\boxed{42}\n\n**Question 2:** Kim has 9 caps.\n\\boxed{31}", "42"),
        ("#### 42\n\n### Problem 2\nKim has 9 caps.\n#### 31", "42"),
        ("42 pears.\nuser\nKim has 9 caps.\nassistant\n31", "42"),
        ("Problem: how many pears?\nSolution: 6 * 7 = 42", "42"),
        ("Sure!\n\nQuestion: How many pears?\nAnswer: 6 * 7 = 42\n\nQuestion: And caps?\nAnswer: 31", "42"),
        ("It takes 4 3/4 days.", "4.75"),
        ("The answer is 4¾ days.", "4.75"),
        (r"Thus \boxed{4\frac{3}{4}} days.", "4.75"),
        (r"Thus \boxed{-4\,\dfrac34} degrees.", "-4.75"),
        (r"\boxed{\frac58}", "0.625"),
        (r"\boxed{\frac{3 \times 7}{4}}", "5.25"),
        ("#### 4 and a half", "4.5"),
        ("It is 42 m² large.", "42"),
        ("It is 42 m^2 large.", "42"),
        ("They pay Rs.420", "420"),
        ("They pay Rs. 4,20,000 in all", "420000"),
        ("They earned ₹42,00,000.", "4200000"),
        ("That makes 4 200 000 stamps", "4200000"),
        ("#### 42 000", "42000"),
        (r"\boxed{4.2 \times 10^5}", "420000"),
        ("There are 4.2e5 ants", "420000"),
        ("There are 4.2 × 10⁵ ants", "420000"),
        ("答えは ４２ です。", "42"),
        ("It weighs approx.42 kg", "42"),
        ("The answer is approx. 42 kg for all 3 crates.", "42"),
        ("#### 1) Add the pears\n20 + 1 = 21\n#### 2) Double them\n21 * 2 = 42 pears", "42"),
        ("#### 1: Add the pears\n20 + 1 = 21\n#### 2: Double them\n21 * 2 = 42 pears", "42"),
        ("#### 1. Add the pears\n20 + 1 = 21\n#### 2. Double them\n#### 42", "42"),
        ("#### **1)** Add the pears\n20 + 1 = 21\n#### **2)** So\n21 * 2 = 42 pears", "42"),
        ("#### 1 - Add the pears\n20 + 1 = 21\n#### 2 - Double them\n21 * 2 = 42 pears", "42"),
        ("#### 42: that is what all 3 have", "42"),
        ("####\n42\nfor all 3", "42"),
        ("Final Answer: 42 pears in the 3 bowls.", "42"),
        ("### Final Answer\n\n**42** pears in 3 bowls", "42"),
        ("**Answer:** 42 (6 bowls with 7 pears)", "42"),
        ("Answer: 42 pears\n\nCheck: 42 / 7 = 6", "42"),
        ("Answer: 21 pears are green. Twice as many are 42.", "42"),
        ("Ans: 42 pears in 3 bowls", "42"),
        ("<answer>42</answer> found in 3 steps", "42"),
        ("<final_answer> $42 </final_answer> found in 3 steps", "42"),
        ('{"answer": 42, "unit": "pears"}', "42"),
        ("The answer is:\n42\nfor all 3", "42"),
        ("So the answer is\n\n\\[ 42 \\]\n\nfor all 3", "42"),
        ("The answer to the last of the 3 questions is 42, not 31", "42"),
        ("The answer is 42. I think the answer is clear to all 3 of them.", "42"),
        ("\\boxed 42 for all 3", "42"),
        ("\\fbox{42} for all 3", "42"),
    ],
)
def test_forms_that_models_write(reply: str, target: str) -> None:
    assert GSM8K.score(reply, example(target))["accuracy"] is True


@pytest.mark.parametrize(
    ("reply", "target"),
    [
        ("The answer is 4 3/4 days.", "4"),
        ("The answer is 4¾ days.", "4"),
        (r"\boxed{4\frac{3}{4}}", "7.75"),
        (r"\boxed{\frac34}", "34"),
        ("There are 4.2e5 ants", "4.2"),
        ("<think>so it is 42", "42"),
        ("<think>so it is 42</think>", "42"),
        ("<|im_end|>42", "42"),
    ],
)
def test_forms_that_are_no_answer(reply: str, target: str) -> None:
    assert GSM8K.score(reply, example(target))["accuracy"] is False


def test_real_answers_score_right_and_changed_ones_wrong(shared_data: Path) -> None:
    right = wrong = 0
    start = time.perf_counter()
    for item in load_examples(GSM8K, shared_data / "gsm8k" / "test.jsonl.gz", "test"):
        assert item.reference is not None
        worked, _, number = item.reference.rpartition("#### ")
        right += GSM8K.score(item.reference, item) == {"accuracy": True, "strict": True}
        right += GSM8K.score(f"{worked}The answer is ${number}.", item)["accuracy"] is True
        right += GSM8K.score(f"{worked}So we get \\boxed{{{number}\\text{{ in all}}}}.", item)["accuracy"] is True
        changed = int(item.target) + 1
        wrong += GSM8K.score(f"{worked}#### {changed}", item) == {"accuracy": False, "strict": False}
        wrong += not GSM8K.score(f"{worked}\\boxed{{{changed}}}", item)["accuracy"]
        wrong += not GSM8K.score(f"{worked}#### {-int(item.target)}", item)["accuracy"]
    assert (right, wrong) == (3 * 1319, 3 * 1319)
    assert time.perf_counter() - start < 60  # about 3 s


def test_scores_in_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda n: GSM8K.score(f"{n}.0", example("7"))["accuracy"], range(100)))
    assert scores == [n == 7 for n in range(100)]


PIECES = [
    "#### ", "\\boxed{", "}", "the answer is ", "=", "\\frac{", "**", "^", "!", "(", ")", "-", ",", "$", ".", "/", "\n",
    "9", "1,111", "x", " ", "Question", "\\text{", "%", "99999999",
]  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text())
def test_no_reply_raises(reply: str) -> None:
    scores = GSM8K.score(reply, example("9"))
    assert set(scores) == {"accuracy", "strict"} and all(isinstance(score, bool) for score in scores.values())


@pytest.mark.parametrize(
    "piece",
    [*PIECES, "9**", "9^", "#### 9 ", "\\boxed{9", "the answer is 9 ", "1,", "$-", "( ", "<answer>", "ans:9 "],
)
def test_no_reply_hangs(piece: str) -> None:
    reply = piece * (50_000 // len(piece))
    start = time.process_time()
    for text in (
        reply,
        "#### 1 " + reply,
        "\\boxed{" + reply,
        "the answer is 1" + reply + "!",
        "\\boxed{9" + reply + "}",
    ):
        GSM8K.score(text, example("9"))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("power", ["9^{9^{9^{9^9}}}", "9**9**9**9", "9!!!!!!!!", "10^10^10^10", "9" * 400])
def test_towers_of_powers_are_not_computed(power: str) -> None:
    start = time.process_time()
    GSM8K.score(f"\\boxed{{{power}}}", example("7"))
    assert time.process_time() - start < 5


def test_own_rows() -> None:
    row = {"question": " How many? ", "answer": "5 + 5 = <<5+5=10>>10\n#### 1,010"}
    assert read(row) == Example(user_turn("How many?"), row["answer"], "1010", id="gsm8k-test-1")


def test_rows_of_the_papers_test_form() -> None:
    row = {"question": "How many?", "target": "18", "source": "GSM8K", "tag": {"level": 3}}
    assert read(row) == Example(user_turn("How many?"), None, "18", {"source": "GSM8K", "level": "3"}, id="gsm8k-test-1")
    both = read({**row, "answer": "9 + 9 = 18\n#### 18", "tag": {}})
    assert isinstance(both, Example) and both.reference == "9 + 9 = 18\n#### 18" and both.target == "18"


@pytest.mark.parametrize(("target", "text"), [(18, "18"), (18.0, "18"), (0.5, "0.5"), (-3, "-3"), (" 1,800 ", "1800")])
def test_targets(target: Any, text: str) -> None:
    row = read({"question": "?", "target": target})
    assert isinstance(row, Example) and row.target == text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "#### 1"}, "no field 'question'"),
        ({"question": "?"}, "no field 'answer' or 'target'"),
        ({"question": "?", "answer": None}, "no field 'answer' or 'target'"),
        ({"question": "", "answer": "#### 1"}, "empty question"),
        ({"question": 3, "answer": "#### 1"}, "field 'question' is not text"),
        ({"question": "\ud800", "answer": "#### 1"}, "field 'question' is not valid Unicode"),
        ({"question": "?", "answer": "18"}, "answer without '####'"),
        ({"question": "?", "answer": "#### many"}, "target is not a number"),
        ({"question": "?", "target": "x + 1"}, "target is not a number"),
        ({"question": "?", "target": True}, "field 'target' is not text"),
        ({"question": "?", "target": float("nan")}, "target is not a number"),
        ({"question": "?", "target": float("inf")}, "target is not a number"),
        ({"question": "?", "target": "9" * 41}, "target is not a number"),
    ],
)
def test_bad_rows(row: dict[str, Any], reason: str) -> None:
    assert read(row) == BadRow(1, reason)


def test_bad_rows_are_passed_on() -> None:
    bad = BadRow(4, "not valid JSON", "x")
    assert list(GSM8K.read([(4, bad)], "test")) == [bad]
