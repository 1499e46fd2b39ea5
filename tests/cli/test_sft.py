"""The sft command: a general model learns a task's answers."""

import json
from pathlib import Path

import pytest
import torch
from commands import question_rows, refused, write_rows
from tiny import save_tiny_adapter, save_tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from cllm.attention import LENGTHS
from cllm.cli import sft
from cllm.errors import UsageError
from cllm.models import read_record
from cllm.prompts import PromptTemplate
from cllm.tasks.base import Example
from cllm.training.sft import AnswerCollator, AnswerDataset, Answered, AnswerTrainer


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
    sft.main([*words, "--logging_steps=1", "--attn_implementation=eager", f"--output_dir={tmp_path / 'eager'}"])
    again = json.loads((tmp_path / "eager" / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in again if "loss" in entry] == pytest.approx(losses, rel=1e-2)
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


SHARED = list(range(20, 60))  # what prompts begin with
ROWS = [
    Answered([*SHARED, 1, 2], [3, 4, 5]),
    Answered([5], [6]),
    Answered([*SHARED, 7], [8]),
    Answered([*SHARED, 1, 2, 9], [8, 8]),
    Answered([8, 9, 10, 11], [12]),
]


def test_a_consistency_adapter_is_no_model_to_train(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", tmp_path / "m")
    message = refused(capsys, sft.main, *words[1:], f"--model={adapter}")
    assert message == f"{adapter} holds a consistency adapter, which is not trained on; pass its target model, {tmp_path / 'm'}"
    assert not (tmp_path / "out").exists()


def test_a_shared_beginning_is_packed_once() -> None:
    batch = AnswerCollator(0)(ROWS)
    useful = (batch["block"] >= 0).sum()
    assert useful == len(SHARED) + 5 + 2 + 5 + 2 + 5 < sum(len(row.prompt_ids) + len(row.answer_ids) for row in ROWS)
    alone = AnswerCollator(0)([ROWS[0]])
    assert alone["input_ids"][alone["block"] >= 0].tolist() == [*SHARED, 1, 2, 3, 4, 5] and alone["target"].tolist() == [3, 4, 5]
    assert alone["input_ids"].shape[1] % LENGTHS == 0
    assert alone["index"].tolist() == [[0, 41], [0, 42], [0, 43]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_loss_is_that_of_plain_padded_rows(kind: str, smoothing: float, tmp_path: Path) -> None:
    """On the answers alone, with prompts that share their beginning and others, and with sliding windows."""
    model = tiny_model(kind, vocab_size=97)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=smoothing)
    trainer = AnswerTrainer(model=model, args=args, data_collator=AnswerCollator(0))
    loss = trainer.compute_loss(model, AnswerCollator(0)(ROWS))
    gradient = torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]
    logits, goals = [], []
    for row in ROWS:
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        logits.append(model(ids).logits[0, len(row.prompt_ids) - 1 : -1])
        goals += row.answer_ids
    plain = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(goals), label_smoothing=smoothing)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, model.get_input_embeddings().weight)[0])


def test_examples_that_cannot_be_learned_are_counted() -> None:
    tokenizer, ask = tiny_tokenizer(), ({"role": "user", "content": "How many?"},)
    examples = [Example(ask), Example(ask, "seven"), Example(ask, "x" * 200)]
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
        ("--attn_implementation=flex_attention", "no backward pass on a CPU; use sdpa or eager there"),
    ],
)
def test_bad_input(words: list[str], more: str, message: str, capsys: pytest.CaptureFixture) -> None:
    name = more.partition("=")[0]
    assert message in refused(capsys, sft.main, *(word for word in words if not word.startswith(f"{name}=")), more)
