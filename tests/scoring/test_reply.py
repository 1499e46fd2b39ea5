"""cllm.scoring.reply: candidates in replies with reasoning, special tokens or further questions."""

import time

import pytest

from cllm.scoring.reply import answer_candidates


@pytest.mark.parametrize(
    ("reply", "answers"),
    [
        ("Yes.", ["Yes."]),
        ("<think>No?</think>Yes.", ["Yes."]),
        ("<THINKING>\nNo?\n</thinking >Yes.", ["Yes."]),
        ("No? No.</think>Yes.", ["Yes."]),
        ("[THINK]No?[/THINK]Yes.", ["Yes."]),
        ("<|channel|>analysis<|message|>No?<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>", ["Yes."]),
        ("<think>a<think>b</think>c</think>Yes.", ["Yes."]),
        ("<think>No?", []),
        ("<think>No?</think>", []),
        ("<think>No?</think>Yes.<think>Or", ["Yes."]),
        ("Perhaps.<think>No?</think>Yes.", ["Yes.", "Perhaps."]),
        ("Yes.<think>Right?</think>", ["Yes."]),
        ("print('<think>') and `</think>`", ["print('<think>') and `</think>`"]),
    ],
)
def test_reasoning_is_left_out(reply: str, answers: list[str]) -> None:
    assert answer_candidates(reply) == answers


@pytest.mark.parametrize(
    "token",
    ["<|im_end|>", "</s>", "<|endoftext|>", "<|eot_id|>", "<|EOT|>", "<end_of_turn>", "<eos>", "<｜end▁of▁sentence｜>",
     "[INST]", "<|im_start|>", "<|user|>"],
)  # fmt: skip
def test_a_special_token_ends_the_reply(token: str) -> None:
    assert answer_candidates(f"Yes.{token}\nNo.") == ["Yes."]
    assert answer_candidates(f"Say '{token}'.") == [f"Say '{token}'."]


@pytest.mark.parametrize(
    "opening", ["<s>", "<|im_start|>assistant", "<|assistant|>", "<|start_header_id|>assistant<|end_header_id|>", "[/INST]"]
)
def test_special_tokens_may_open_the_reply(opening: str) -> None:
    assert answer_candidates(f"{opening} Yes.</s>") == [" Yes."]


@pytest.mark.parametrize(
    "turn",
    ["Q: And then?", "Question: And then?", "Question 2: And then?", "Problem: And then?", "**Problem 2:** And then?",
     "### Question\nAnd then?", "### Problem 2:\nAnd then?", "### Instruction:\nGo on", "User: And then?", "Human: And then?",
     "> Q2. And then?", "- Exercise: And then?", "Next question: And then?", "Here is another problem: And then?",
     "-- Question: And then?", "user\nAnd then?", "question: and then?"],
)  # fmt: skip
def test_a_further_question_starts_a_candidate(turn: str) -> None:
    assert answer_candidates(f"Yes.\n{turn}\nA: No.") == ["Yes.\n", f"{turn}\nA: No."]
    assert answer_candidates(f"{turn}\nA: Yes.") == [f"{turn}\nA: Yes."]


@pytest.mark.parametrize(
    "text",
    ["The question: none.", "Questions: 3", "Problem solved: 3.", "Users: 3", "Q: int = 3", "User: type[list] = list",
     "    Question: inside of code", "#### 3\n## User's cost"],
)  # fmt: skip
def test_other_lines_start_no_candidate(text: str) -> None:
    assert answer_candidates(f"Yes.\n{text}") == [f"Yes.\n{text}"]


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think ", "'<think>", "<|a", "##", "- ", "\n-", "\nQ", "\n ", "Q:"])
def test_long_replies_are_fast(piece: str) -> None:
    start = time.process_time()
    answer_candidates(piece * (100_000 // len(piece)))
    assert time.process_time() - start < 2
