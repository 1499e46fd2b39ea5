"""scripts/race_picture.py: a result file's record of one prompt, drawn forward by forward."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import refused
from race_picture import main, steps
from tiny import EOS_ID, save_tiny_checkpoint, tiny_tokenizer

REPLY = "SELECT a"
ACCEPTED = {"ar": [1] * 9, "jacobi": [1, 4, 3, 1]}  # the end of the response included
TIMED = {"ar": {"seconds": 5.0, "prefill_seconds": 1.0}, "jacobi": {"seconds": 2.5, "prefill_seconds": 1.0}}


def result(**settings: Any) -> dict[str, Any]:
    methods = {name: {"accepted": accepted, "tokens": sum(accepted)} for name, accepted in ACCEPTED.items()}
    prompt = {"id": "one", "batch": 0, "methods": methods, "responses": {"jacobi": REPLY}}
    return {"settings": {"batch_size": 1, "eos_token_ids": [EOS_ID]} | settings, "batches": [TIMED], "prompts": [prompt]}


def test_both_methods_write_the_reply_in_their_measured_time() -> None:
    found = steps(result(), "one", tiny_tokenizer())
    for method, accepted in ACCEPTED.items():
        own = [step for step in found if step.method == method]
        assert [len(step.gained) for step in own] == accepted
        assert [step.ended for step in own] == [False] * (len(own) - 1) + [True]
        assert "".join(token.text for step in own for token in step.gained) == REPLY
        assert own[0].seconds == TIMED[method]["prefill_seconds"]
        assert own[-1].seconds == pytest.approx(TIMED[method]["seconds"])
        assert all([token.kind for token in step.gained][-1] == "plain" for step in own)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_checkpoint(tmp_path / "model")
    file, output = tmp_path / "speedup.json", tmp_path / "race.svg"
    words = [file, "--tokenizer", model, "--question", "Why?", "--title", "tiny", "--output", output, "--prompt"]
    file.write_text(json.dumps(result()))
    main([str(word) for word in (*words, "one")])
    assert "Why?" in output.read_text() and "amber" not in output.read_text()
    assert "no prompt 'two'" in refused(capsys, main, *words, "two")
    file.write_text(json.dumps(result(batch_size=4)))
    assert "batch_size must be 1, since times are measured per batch, got 4" in refused(capsys, main, *words, "one")
