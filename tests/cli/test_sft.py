"""The sft command: a general model learns a task's answers."""

import json
from pathlib import Path

import pytest
import torch
from commands import question_rows, refused, write_rows
from tiny import save_tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from cllm.cli import sft
from cllm.errors import UsageError
from cllm.models import read_record
from cllm.prompts import PromptTemplate
from cllm.tasks.base import Example
from cllm.training.sft import IGNORED, AnswerCollator, AnswerDataset, Answered, AnswerTrainer


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    model = save_tiny_checkpoint(tmp_path / "m", seed=3)
    data = write_rows(tmp_path / "d.jsonl", question_rows(4))
    given = {"model": model, "task": "gsm8k", "filename": data, "output_dir": tmp_path / "out", "max_steps": 8}
    given |= {"learning_rate": 1e-2, "use_cpu": "true", "report_to": "none", "save_strategy": "steps", "save_steps": 4}
    return [f"--{name}={value}" for name, value in given.items()]


def test_it_learns_and_is_a_plain_checkpoint(words: list[str], tmp_path: Path) -> None:
    sft.main([*words, "--logging_steps=1"])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    record = read_record(model.config)
    assert record["prompt_template"] == "chat" and "block_size" not in record


def test_the_loss_on_held_out_rows(words: list[str], tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "h.jsonl", question_rows(9)[4:])
    sft.main([*words, f"--eval_file={held_out}"])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "eval_loss" in entry]) == 8  # epochs of one step


def test_resumed_equals_uninterrupted(words: list[str], tmp_path: Path) -> None:
    def weights() -> dict[str, torch.Tensor]:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()

    sft.main(words)
    whole = weights()
    sft.main([*words, f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-4'}"])
    resumed = weights()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_adapters_are_merged_into_a_plain_checkpoint(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    sft.main([*words, "--max_steps=2", "--lora_r=2"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file() and read_record(model.config)["lora_r"] == 2
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before.state_dict()[name])}
    assert changed and all("_proj" in name for name in changed)


def test_the_loss_is_on_the_answer_only() -> None:
    batch = AnswerCollator(7)([Answered([1, 2], [3, 4]), Answered([5], [6])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 3, 4], [IGNORED, 6, IGNORED, IGNORED]]


def test_the_loss_is_that_of_the_models_own_forward(tmp_path: Path) -> None:
    model, collator = tiny_model(vocab_size=97), AnswerCollator(0)
    batch = collator([Answered([1, 2], [3, 4, 5]), Answered([5], [6]), Answered([8, 9, 10, 11], [12])])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = AnswerTrainer(model=model, args=args, data_collator=collator)
    own = model(**batch)
    torch.testing.assert_close(trainer.compute_loss(model, batch), own.loss)
    args.label_smoothing_factor = 0.1
    goals = batch["labels"][:, 1:].flatten()
    smoothed = torch.nn.functional.cross_entropy(own.logits[:, :-1].flatten(0, 1), goals, label_smoothing=0.1)
    torch.testing.assert_close(trainer.compute_loss(model, batch), smoothed)


def test_examples_that_cannot_be_learned_are_counted() -> None:
    tokenizer, ask = tiny_tokenizer(), ({"role": "user", "content": "How many?"},)
    examples = [Example("a", ask), Example("b", ask, "seven"), Example("c", ask, "x" * 200)]
    rows = AnswerDataset(examples, PromptTemplate("{question}"), tokenizer, 64)  # type: ignore[arg-type]
    assert len(rows) == 1 and rows[0].answer_ids[-1] == tokenizer.eos_token_id
    assert rows.left_out == {"no answer": 1, "longer than the context": 1}
    with pytest.raises(UsageError, match=r"no example to train on \(no answer: 1\)"):
        AnswerDataset(examples[:1], PromptTemplate("{question}"), tokenizer, 64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--task=gsm", "unknown task 'gsm'"),
        ("--filename=none.jsonl", "cannot read none.jsonl"),
        ("--learning_rate=-1", "learning_rate must be >= 0"),
        ("--data_size=0", "must be >= 1, got 0"),
    ],
)
def test_bad_input(words: list[str], more: str, message: str, capsys: pytest.CaptureFixture) -> None:
    name = more.partition("=")[0]
    assert message in refused(capsys, sft.main, *(word for word in words if not word.startswith(f"{name}=")), more)
