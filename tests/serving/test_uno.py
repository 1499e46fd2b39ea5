"""UNO's adapter format, and its two-pass layout, whose text is the base model's."""

import json
import random
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from cases import generate
from huggingface_hub import ModelCard
from tiny import random_adapter, save_tiny_adapter, save_tiny_checkpoint, tiny_model

from cllm import reference
from cllm.adapter import ADAPTER, ADAPTER_WEIGHTS, attached, read_adapter
from cllm.cli import export as command
from cllm.errors import UsageError
from cllm.models import load_model
from cllm.serving.export import FORMS, export

pytestmark = pytest.mark.usefixtures("one_thread")


def uniform(seed: int):
    draw = random.Random(seed)
    return lambda prefix, size: [draw.randrange(97) for _ in range(size)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_two_passes_give_the_base_models_text(kind: str, seed: int) -> None:
    """For any adapter; and each pair of forwards gives at least two tokens."""
    draw = random.Random(f"{kind} {seed}")
    model = tiny_model(kind, seed, vocab_size=97, eos_token_id=None)
    prompt = [draw.randrange(1, 97) for _ in range(draw.randint(1, 12))]
    expected = generate(model, prompt, 24, [])
    stops = [expected[draw.randrange(24)]]
    for eos, text in (([], expected), (stops, expected[: expected.index(stops[0]) + 1])):
        adapter, width = random_adapter(model, seed), draw.randint(2, 9)
        found, forwards = reference.decode_two_passes(model, adapter, prompt, width, 24, uniform(seed), eos)
        assert found == text and forwards <= 1 + 2 * -(-(len(text) - 1) // 2)


def test_right_drafts_are_accepted() -> None:
    """An adapter of zeros drafts right guesses from right ones, so that whole blocks are accepted."""
    model, prompt = tiny_model(vocab_size=97, eos_token_id=None), [5, 9, 13]
    text = prompt + generate(model, prompt, 31, [])
    nothing = random_adapter(model, size=0.0)
    found, forwards = reference.decode_two_passes(model, nothing, prompt, 5, 31, lambda known, size: text[len(known) :][:size])
    assert found == text[3:] and forwards == 1 + 2 * 5  # 6 tokens at a time: the block of 5, and one more


def test_drafting_changes_only_the_last_tokens() -> None:
    import torch

    model = tiny_model(vocab_size=97)
    adapter, ids = random_adapter(model), torch.arange(4, 12)[None]
    plain = model(ids).logits
    with reference.drafting(model, adapter, 3):
        drafted = model(ids).logits
    assert torch.equal(plain[:, :5], drafted[:, :5]) and not torch.isclose(plain[:, 5:], drafted[:, 5:]).all(dim=2).any()
    assert torch.equal(model(ids).logits, plain)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = save_tiny_checkpoint(tmp_path / "base", seed=4)
    return save_tiny_adapter(tmp_path / "adapter", base, guess="uniform", prompt_template="chat")


def test_export_is_an_ordinary_adapter(adapter: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "out", form="uno")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {ADAPTER, ADAPTER_WEIGHTS, "config.json", "README.md"}
    config = json.loads((tmp_path / "out" / ADAPTER).read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert read_adapter(tmp_path / "out").parameters == read_adapter(adapter).parameters
    assert attached(load_model(str(tmp_path / "out"), device="cpu")) is not None
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "--speculative-algorithm UNO --uno-lora-path PATH" in text and "not run on it" in text


def test_refused_adapters(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    cold = save_tiny_adapter(tmp_path / "cold", base, guess="context")
    for model, form, message in (
        (adapter, "merged", "another model and another text"),
        (base, "merged", "another model and another text"),
        (adapter, "gguf", "form must be one of transformers, uno, got 'gguf'"),
        (cold, "uno", "trained to start from 'context'"),
        (base, "uno", "needs a folder that `cllm train --lossless` wrote"),
    ):
        with pytest.raises(UsageError, match=message):
            export(str(model), tmp_path / "out", form=form)
        assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as exit_:
        command.main([str(adapter), str(tmp_path / "out"), "--format", "merged"])
    assert exit_.value.code == 2 and "cannot be merged" in capsys.readouterr().err


def test_the_commands_forms_are_the_librarys() -> None:
    assert get_args(get_type_hints(command.ExportOptions)["form"]) == (*FORMS, "merged")
