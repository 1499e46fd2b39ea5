"""Loading checkpoints: faults of folders, and the messages about them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny import EOS_ID, PAD_ID, save_tiny_adapter, save_tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer
from transformers import MambaConfig

from cllm.adapter import attached
from cllm.attention import MASKABLE
from cllm.decoding.guess import STRATEGIES
from cllm.errors import UsageError
from cllm.models import (
    DTYPES,
    context_length,
    load_model,
    load_tokenizer,
    read_record,
    stop_token_ids,
    weights_stamp,
    write_record,
)
from cllm.options import GUESSES, Dtype, Maskable

Change = Callable[[Path], object]


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def holding(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def setting(name: str, **values: object) -> Change:
    """Set keys of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


@pytest.fixture
def broken(tiny_model_dir: Path, tmp_path: Path) -> Callable[[Change], str]:
    def make(change: Change) -> str:
        shutil.copytree(tiny_model_dir, tmp_path / "m")
        change(tmp_path / "m")
        return str(tmp_path / "m")

    return make


def message_of(load: Callable[[str], object], path: str) -> str:
    with pytest.raises(UsageError) as error:
        load(path)
    message = str(error.value)
    assert repr(path) in message and "\n" not in message and not message.endswith(":")
    return message


# ---- models ----


def test_defaults(tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), device="cpu")
    assert model.dtype == torch.float32 and not model.training
    assert load_model(str(tiny_model_dir), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    eager = load_model(str(tiny_model_dir), device="cpu", attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize("path", ["/no/such/folder", "no/such/folder", "a b", "../x", ""])
def test_neither_a_path_nor_a_hub_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for load in (load_model, load_tokenizer):
        assert "must be a checkpoint folder or a hub name" in message_of(load, path)


def test_a_file_instead_of_a_folder(tiny_model_dir: Path) -> None:
    path = str(tiny_model_dir / "model.safetensors")
    assert "must be a checkpoint folder" in message_of(load_model, path)


def test_an_unknown_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot load a causal language model" in message_of(load_model, "nobody/nothing")
    assert "cannot load a tokenizer" in message_of(load_tokenizer, "nobody/nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config.json"), "model_type"),
        (without("model.safetensors"), "no file named model.safetensors"),
        (holding("model.safetensors", b""), "header too small"),
        (holding("config.json", b'{"a":'), "not a valid JSON file"),
        (setting("config.json", model_type="zork"), "does not recognize this architecture"),
        (setting("config.json", hidden_size="x"), "expected int, got str"),
        (setting("config.json", num_hidden_layers=4), "missing or of another shape: model.layers.3."),
        (setting("config.json", hidden_size=64), "and 27 more"),
    ],
)
def test_damaged_models(broken: Callable[[Change], str], change: Change, message: str) -> None:
    assert message in message_of(load_model, broken(change))


def test_truncated_weights(broken: Callable[[Change], str], tiny_model_dir: Path) -> None:
    head = (tiny_model_dir / "model.safetensors").read_bytes()[:5000]
    assert "incomplete" in message_of(load_model, broken(holding("model.safetensors", head)))


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "cannot load a causal language model" in message_of(load_model, str(tmp_path))
    assert "it has no tokenizer files" in message_of(load_tokenizer, str(tmp_path))


@pytest.mark.parametrize("device", ["zork", "cuda:99"])
def test_no_such_device(tiny_model_dir: Path, device: str) -> None:
    message_of(lambda path: load_model(path, device=device), str(tiny_model_dir))


def test_unknown_dtype(tiny_model_dir: Path) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int8'; choose from float32, bfloat16, float16"):
        load_model(str(tiny_model_dir), dtype="int8")


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    model = load_model(str(folder), device="cpu")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.slow
def test_loading_shows_no_progress_bar_and_leaves_others_alone(tiny_model_dir: Path) -> None:
    code = (
        "from transformers.utils import logging as l; from huggingface_hub.utils import are_progress_bars_disabled;"
        "from cllm.models import load_model; load_model({!r}, device='cpu');"
        "print(l.is_progress_bar_enabled(), are_progress_bars_disabled())"
    )
    done = subprocess.run([sys.executable, "-c", code.format(str(tiny_model_dir))], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True False\n", "")


# ---- tokenizers ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("tokenizer.json", "tokenizer_config.json"), "it has no tokenizer files"),
        (without("tokenizer.json"), "cannot load a tokenizer"),
        (holding("tokenizer.json", b'{"a":'), "cannot load a tokenizer"),
        (setting("tokenizer_config.json", eos_token=None), "no end-of-sequence token"),
    ],
)
def test_damaged_tokenizers(broken: Callable[[Change], str], change: Change, message: str) -> None:
    assert message in message_of(load_tokenizer, broken(change))


def test_a_pad_token_is_kept(tiny_model_dir: Path) -> None:
    assert load_tokenizer(str(tiny_model_dir)).pad_token_id == PAD_ID


def test_a_missing_pad_token_defaults_to_eos(broken: Callable[[Change], str]) -> None:
    assert load_tokenizer(broken(setting("tokenizer_config.json", pad_token=None))).pad_token_id == EOS_ID


# ---- what configurations say ----


def test_context_length() -> None:
    assert context_length(tiny_config()) == 256
    assert context_length(MambaConfig()) is None


@pytest.mark.parametrize(("configured", "expected"), [(None, [2]), (5, [2, 5]), ([7, 2], [2, 7])])
def test_stop_token_ids(configured, expected) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = configured
    assert stop_token_ids(model, tiny_tokenizer()) == expected


def test_record_survives_saving(tmp_path: Path) -> None:
    model = tiny_model()
    assert read_record(model.config) == {}
    write_record(model.config, {"block_size": 4, "prompt_template": "Q {question}"})
    model.save_pretrained(tmp_path)
    assert read_record(load_model(str(tmp_path), device="cpu").config)["block_size"] == 4


def test_the_stamp_changes_with_the_weights(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "m")
    stamp = weights_stamp(folder)
    assert stamp and stamp == weights_stamp(folder)
    save_tiny_checkpoint(folder, seed=1)
    assert weights_stamp(folder) != stamp
    assert weights_stamp("someone/on-the-hub") is None


def test_the_commands_offer_what_the_library_takes() -> None:
    assert tuple(DTYPES) == get_args(Dtype) and tuple(MASKABLE) == get_args(Maskable)
    assert tuple(STRATEGIES) == GUESSES


def test_an_adapter_moved_together_with_its_target(tmp_path: Path) -> None:
    save_tiny_adapter(tmp_path / "a" / "cllm", save_tiny_checkpoint(tmp_path / "a" / "target"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert attached(load_model(str(tmp_path / "b" / "cllm"))) is not None
    (tmp_path / "b" / "target").rename(tmp_path / "b" / "other")
    with pytest.raises(UsageError, match="the base model of the adapter in .*cllm"):
        load_model(str(tmp_path / "b" / "cllm"))
