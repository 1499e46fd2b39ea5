"""Exported consistency adapters: with the unchanged target model, or alone; what is refused; the model cards."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import save_tiny_adapter, save_tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

import cllm
from cllm.adapter import ADAPTER, ADAPTER_WEIGHTS, BASE_REVISION, attached, read_adapter
from cllm.decoding import JacobiDecoder
from cllm.errors import UsageError
from cllm.files import write_json
from cllm.models import RECORD, add_to_record, load_model, load_tokenizer, weights_stamp
from cllm.serving.export import CODE, code, export
from cllm.serving.fastchat import CllmAdapter

PROMPT = [[5, 6, 7, 8]]
ALONE = """
import json, sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cllm":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM

path = sys.argv[1]
plain = AutoModelForCausalLM.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
lengths = []
model.register_forward_pre_hook(lambda model, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
options = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "max_new_tokens": 40, "return_dict_in_generate": True}
expected = plain.generate(**options).sequences
found = {}
for name, more in {"with": {}, "without": {"drafts": 0}}.items():
    lengths.clear()
    output = model.generate(**options, **more)
    found[name] = {"same": torch.equal(output.sequences, expected), "forwards": output.forwards.tolist(), "lengths": lengths[:]}
named = plain.generate(**options, custom_generate=path, trust_remote_code=True)
found["named"] = torch.equal(named.sequences, expected) and named.forwards.tolist() == found["with"]["forwards"]
print(json.dumps(found))
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "base", seed=4)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """The output folder of training an adapter."""
    folder = save_tiny_adapter(tmp_path / "adapter", base, task="gsm8k", prompt_template="chat", responses=8, lora_r=4)
    (folder / "README.md").write_text("peft's")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def decoded(model: Any, **options: Any) -> tuple[list[int], int]:
    """A text and its number of forwards, which a random adapter changes without reducing it."""
    (result,) = JacobiDecoder(model, **options).generate(PROMPT, max_new_tokens=40)
    return result.token_ids, result.forwards


def test_target_is_unchanged_and_its_adapter_drafts(base: Path, adapter: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "out")
    inside = {ADAPTER, ADAPTER_WEIGHTS, "config.json"}
    assert names(tmp_path / "out") == names(base) | {CODE, "README.md"} | {f"adapter/{name}" for name in inside}
    assert (tmp_path / "out" / CODE).read_text() == code()

    plain, target = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", base))
    ids = torch.tensor(PROMPT)
    assert torch.equal(plain(ids).logits, target(ids).logits)
    assert all(map(torch.equal, plain.state_dict().values(), target.state_dict().values()))

    text, forwards = decoded(model := load_model(str(tmp_path / "out"), device="cpu"))
    assert (text, forwards) == decoded(load_model(str(adapter), device="cpu")) and text == decoded(target, block_size=1)[0]
    assert JacobiDecoder(model).step.drafts == 3 and read_adapter(adapter).parameters == attached(model).parameters
    again = model.generate(ids, max_new_tokens=40, custom_generate=cllm.jacobi, return_dict_in_generate=True, eos_token_id=None)
    assert (again.sequences[0, 4:].tolist(), again.forwards.item()) == (text, forwards)


def test_decodes_without_the_toolkit_installed(adapter: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "out")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-I", "-c", ALONE, str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["with"]["same"] and found["without"]["same"] and found["named"]
    assert max(found["with"]["lengths"][1:]) == 4 + 3 and max(found["without"]["lengths"][1:]) == 4
    assert found["with"]["forwards"] == [decoded(load_model(str(adapter), device="cpu"))[1]] != found["without"]["forwards"]


def test_exported_code_refuses_an_adapter_of_another_model(adapter: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "out")
    save_tiny_checkpoint(tmp_path / "other", seed=5)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "out" / "model.safetensors")
    with pytest.raises(UsageError, match="trained for other weights"):
        load_model(str(tmp_path / "out"), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(UsageError, match="trained for other weights"):
        cllm.custom_generate.generate(torch.tensor(PROMPT), model=model)


def test_export_without_its_adapter_is_the_target(base: Path, adapter: Path, tmp_path: Path, caplog) -> None:
    export(str(adapter), tmp_path / "out")
    (tmp_path / "out" / "adapter" / ADAPTER_WEIGHTS).unlink()
    model = load_model(str(tmp_path / "out"), device="cpu")
    assert attached(model) is None and "decoding without the consistency adapter" in caplog.text
    assert decoded(model)[0] == decoded(load_model(str(base), device="cpu"))[0]


def test_adapter_alone(adapter: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "out", adapter_only=True)
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names(tmp_path / "out") == {ADAPTER, ADAPTER_WEIGHTS, "config.json", "README.md", *tokenizer}
    model = load_model(str(tmp_path / "out"), device="cpu")
    assert decoded(model) == decoded(load_model(str(adapter), device="cpu"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "cllm" and "trust_remote_code" not in card.text
    assert "Do not load this folder with peft" in card.text and "edit its `base_model_name_or_path`" in card.text
    with pytest.raises(UsageError, match="holds only an adapter; for FastChat, `cllm export` it"):
        CllmAdapter().load_model(str(tmp_path / "out"), {})


def test_export_over_another(adapter: Path, tmp_path: Path) -> None:
    """No old file remains that would be loaded with the new ones; an export of an export keeps the adapter."""
    out = tmp_path / "out"
    export(str(adapter), out)
    whole = names(out)
    export(str(adapter), tmp_path / "alone", adapter_only=True)
    export(str(adapter), out, adapter_only=True)
    assert names(out) == names(tmp_path / "alone")
    export(str(adapter), out)
    assert names(out) == whole
    export(str(out), tmp_path / "again")
    assert names(tmp_path / "again") == whole and attached(load_model(str(tmp_path / "again"), device="cpu")) is not None


def test_interrupted_export_can_be_rerun(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for alone in (False, True):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("cllm.serving.export.copy_file", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
            export(str(adapter), tmp_path / f"{alone}", adapter_only=alone)
        assert not (tmp_path / f"{alone}" / ADAPTER).exists()
        export(str(adapter), tmp_path / f"{alone}", adapter_only=alone)
        assert attached(load_model(str(tmp_path / f"{alone}"), device="cpu")) is not None


def test_local_paths_are_not_exported(adapter: Path, tmp_path: Path) -> None:
    """And the adapter in its folder is not mistaken for one to be merged."""
    export(str(adapter), tmp_path / "out")
    assert not any(str(tmp_path).encode() in (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out"))
    with pytest.raises(UsageError, match="must be a checkpoint folder or a hub name, got None"):
        load_model(str(tmp_path / "out" / "adapter"), device="cpu")


def test_target_model_on_the_hub(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights come from the revision that the adapter was trained for, which both kinds of export name."""
    asked = []

    def download(name: str, revision: str, allow_patterns: list[str]) -> Path:
        asked.append((name, revision))
        return base

    monkeypatch.setattr("cllm.serving.contents.snapshot_download", download)
    monkeypatch.setattr("cllm.serving.contents.load_model", lambda path, **options: None)
    add_to_record(adapter, {"target_model": "someone/target", BASE_REVISION: "abc"})
    config = json.loads((adapter / ADAPTER).read_text())
    write_json(adapter / ADAPTER, config | {"base_model_name_or_path": "someone/target"})
    export(str(adapter), tmp_path / "whole")
    export(str(adapter), tmp_path / "alone", adapter_only=True)
    assert asked == [("someone/target", "abc")] * 2
    for folder in (tmp_path / "whole" / "adapter", tmp_path / "alone"):
        assert json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"] == "someone/target"
        assert json.loads((folder / "config.json").read_text())[RECORD][BASE_REVISION] == "abc"
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "`someone/target`, at revision `abc` on the hub" in card and "edit its" not in card


def test_adapter_on_the_hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is attached, whereas transformers with peft would switch it on."""
    monkeypatch.setattr("cllm.models.cached_file", lambda name, file, **where: str(adapter / file))
    monkeypatch.setattr("cllm.models.snapshot_download", lambda name, allow_patterns: str(adapter))
    model = load_model("someone/adapter", device="cpu")
    assert attached(model) is not None and model.name_or_path == "someone/adapter"


def test_card(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(str(adapter), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    record = json.loads((tmp_path / "out" / "config.json").read_text())[RECORD]
    assert {"cllm", "lossless"} <= set(card.data.tags) and card.data.datasets == ["openai/gsm8k"]
    assert all(digest in card.text for digest in record["base_weights"].values())
    assert "; the target model's own responses\n" in card.text and "- largest block: 4" in card.text
    assert "Window: 4 tokens, 3 of them drafted" in card.text and "- rank of the adapter: 4" in card.text
    assert "Without it, the model is the plain target model" in card.text and "cllm serve PATH" in card.text
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == 2 and "trust_remote_code=True" in blocks[0]
    exec(blocks[1].replace("PATH", str(tmp_path / "out")).replace("=256", "=8"), {})
    assert len(capsys.readouterr().out) > 1


def other_tokenizer(adapter: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)


def not_finite(adapter: Path) -> None:
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, adapter / ADAPTER_WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda adapter: save_tiny_checkpoint(adapter.parent / "base", seed=5), "trained for other weights"),
        (lambda adapter: (adapter.parent / "base").rename(adapter.parent / "moved"), "must be a checkpoint folder or a hub"),
        (lambda adapter: (adapter.parent / "base" / "model.safetensors").unlink(), "no file named model.safetensors"),
        (other_tokenizer, "has a different vocabulary from its target model"),
        (lambda adapter: write_json(adapter / ADAPTER, json.loads((adapter / ADAPTER).read_text()) | {"r": 0}), "has rank 0"),
        (lambda adapter: (adapter / ADAPTER_WEIGHTS).write_bytes(b"torn"), "cannot load the adapter in"),
        (not_finite, "is damaged: .* holds numbers that are not finite"),
        (lambda adapter: (adapter / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda adapter: (adapter / "config.json").unlink(), "must be merged into its model's weights first"),
    ],
)
def test_adapters_that_cannot_be_exported(adapter: Path, tmp_path: Path, damage: Any, message: str) -> None:
    damage(adapter)
    with pytest.raises(UsageError, match=message):
        export(str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_exported_or_overwritten(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="adapter_only needs a folder that `cllm train --lossless` wrote"):
        export(str(base), tmp_path / "out", adapter_only=True)
    export(str(adapter), tmp_path / "out")
    with pytest.raises(UsageError, match="adapter_only needs"):
        export(str(tmp_path / "out"), tmp_path / "alone", adapter_only=True)
    for folder in (adapter, base):
        before = names(folder)
        with pytest.raises(UsageError, match="OUTPUT must (be|differ)"):
            export(str(adapter), folder)
        assert names(folder) == before


def test_weights_stamp_changes_with_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "out")
    stamp = weights_stamp(tmp_path / "out")
    save_tiny_adapter(tmp_path / "second", base, seed=1)
    (tmp_path / "second" / ADAPTER_WEIGHTS).replace(tmp_path / "out" / "adapter" / ADAPTER_WEIGHTS)
    assert weights_stamp(tmp_path / "out") != stamp and load_tokenizer(str(tmp_path / "out")).eos_token_id == 2
