"""Exported checkpoints: their files, Jacobi decoding in plain transformers, and the model card."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import question_rows, write_rows
from huggingface_hub import ModelCard
from tiny import save_tiny_checkpoint

from cllm.cli import acc, speedup
from cllm.errors import UsageError
from cllm.files import write_json
from cllm.models import RECORD
from cllm.serving.export import CODE, code, equip, export
from cllm.serving.model_card import read_reports

MADE = {"block_size": 4, "prompt_template": "chat", "task": "gsm8k", "target_model": "someone/target", "responses": 8}
ALONE = """
import json, sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cllm", "datasets", "math_verify"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

path = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
plain = AutoModelForCausalLM.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
found = {"cllm": "cllm" in sys.modules, "plain": hasattr(plain.generate, "func"), "trusted": model.generate.func.__module__}
for size in (1, 4):
    inputs = tokenizer(["1 + 1 =", "a", "Tom has 3 apples.", "zz top"][:size], return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=40, return_dict_in_generate=True)
    found[f"forwards{size}"] = output.forwards.tolist()
    found[f"same{size}"] = torch.equal(output.sequences, plain.generate(**inputs, max_new_tokens=40))
    found[f"single{size}"] = model.generate(**inputs, max_new_tokens=40, block_size=1).tolist() == output.sequences.tolist()
again = plain.generate(**inputs, max_new_tokens=40, custom_generate=path, trust_remote_code=True)
found["named"] = torch.equal(again, output.sequences)
inputs = tokenizer("1 + 1 =", return_tensors="pt")
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
reply = tokenizer.decode(model.generate(**inputs, max_new_tokens=40, streamer=streamer)[0, 7:])
found["stream"] = "".join(streamer) == reply
stopped = {"stop_strings": [reply[9:11]], "tokenizer": tokenizer, "max_new_tokens": 40}
found["stop"] = torch.equal(model.generate(**inputs, **stopped), plain.generate(**inputs, **stopped))
found["drawn"] = [model.generate(**inputs, do_sample=True, seed=seed, max_new_tokens=20).tolist() for seed in (1, 1, 2)]
print(json.dumps(found))
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as the trainer saves it."""
    folder = save_tiny_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {RECORD: MADE})
    for name in ("trainer_state.json", "training_args.bin", "tune.json"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-1").mkdir()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_decodes_without_the_toolkit_installed(checkpoint: Path, tmp_path: Path) -> None:
    export(str(checkpoint), tmp_path / "out")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-I", "-c", ALONE, str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["cllm"] and not found["plain"] and found["trusted"].endswith("custom_generate.generate")
    assert all(found[name] for name in ("same1", "same4", "single1", "single4", "named", "stream", "stop"))
    assert found["forwards1"][0] == found["forwards4"][0] < 40 and len(found["forwards4"]) == 4
    assert found["drawn"][0] == found["drawn"][1] != found["drawn"][2]


def test_files_of_an_export(checkpoint: Path, tmp_path: Path) -> None:
    """All files of the checkpoint and none of the training run's; the source is unchanged."""
    before = files(checkpoint)
    export(str(checkpoint), tmp_path / "out")
    after = files(tmp_path / "out")
    kept = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    kept |= {"generation_config.json"}  # with all stop tokens
    assert files(checkpoint) == before and {name for name in after if after[name] == before.get(name)} == kept
    assert after.keys() - kept == {CODE, "README.md"} and after[CODE].decode() == code()


def test_only_an_earlier_export_is_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    export(str(checkpoint), tmp_path / "out")
    first = files(tmp_path / "out")
    (tmp_path / "out" / "model-00002-of-00002.safetensors").touch()  # would be loaded
    (tmp_path / "out" / CODE).write_text(code() + "# changed")
    export(str(checkpoint), tmp_path / "out")
    assert files(tmp_path / "out") == first
    with pytest.raises(UsageError, match="OUTPUT must differ from the folders of MODEL"):
        export(str(tmp_path / "out"), tmp_path / "out" / ".." / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UsageError, match="has other files in it"):
        export(str(checkpoint), tmp_path / "mine")
    assert files(tmp_path / "mine").keys() == {"notes.txt"}
    equip(checkpoint)  # as at the end of training
    with pytest.raises(UsageError, match="has other files in it"):
        export(str(tmp_path / "out"), checkpoint)


def test_generation_config_has_all_stop_tokens(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.7}')  # no pad, no do_sample
    export(str(checkpoint), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"], written["temperature"]) == ([2, 7], 0, 0.7)


def test_foreign_readme_is_kept(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("mine")
    equip(checkpoint)
    assert (checkpoint / "README.md").read_text() == "mine" and (checkpoint / CODE).is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights in"),
        (lambda folder: (folder / "config.json").unlink(), "cannot load a causal language model from"),
        (lambda folder: [path.unlink() for path in folder.glob("*token*")], "cannot load a tokenizer from"),
        (lambda folder: write_json(folder / "config.json", {"model_type": "mamba"}), "cannot be rolled back"),
    ],
)
def test_checkpoints_that_cannot_be_exported(checkpoint: Path, tmp_path: Path, damage: Any, message: str) -> None:
    damage(checkpoint)
    with pytest.raises(UsageError, match=message):
        export(str(checkpoint), tmp_path / "out")


def test_card(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the hub's metadata, the recipe, and the figures of result files."""
    monkeypatch.setattr("cllm.serving.model_card.try_to_load_from_cache", lambda name, file: f"cache/{name}/{file}")
    data = write_rows(tmp_path / "test.jsonl", question_rows(3))
    common = ["--filename", data, "--device", "cpu"]
    speed, answers = tmp_path / "speed.json", tmp_path / "answers.jsonl"
    sizes = ["--max_new_tokens", 4, "--max_new_seq_len", 8, "--output", speed, "--target_model", checkpoint]
    speedup.main([*map(str, ["--test_model", checkpoint, *common, *sizes])], task="gsm8k")
    tokens = ["--max_new_tokens_for_consistency", 4, "--max_tokens", 8, "--output_file_name", answers]
    acc.main([*map(str, ["--model_dir", checkpoint, *common, *tokens]), "--use_consistency_decoding"], task="gsm8k")
    accuracy = answers.with_suffix(".accuracy.json")
    export(str(checkpoint), tmp_path / "out", [speed, accuracy])

    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "someone/target" and card.data.datasets == ["openai/gsm8k"]
    assert card.data.library_name == "transformers" and {"cllm", "custom_generate"} <= set(card.data.tags)
    report = json.loads(speed.read_text())
    tpf = report["methods"]["jacobi"]["tokens_per_forward"]
    assert [r.metric_value for r in card.data.eval_results if r.metric_type == "tokens_per_forward"] == [round(tpf, 4)]
    assert f"| Jacobi 4 sliding, context | {tpf:.2f} [" in card.text and "- responses trained on: 8" in card.text
    assert "| NLL under the target, nats/token | " in card.text and "**gsm8k**, 3 answers" in card.text
    assert "tokenizer.apply_chat_template(" in card.text and str(tmp_path) not in card.text

    write_json(speed, report | {"record": MADE | {"block_size": 8}})
    with pytest.raises(UsageError, match="measured on another checkpoint"):
        export(str(checkpoint), tmp_path / "out", [speed])
    with pytest.raises(UsageError, match="is not what `cllm speedup` or `cllm acc` writes"):
        export(str(checkpoint), tmp_path / "out", [checkpoint / "config.json"])


def test_card_of_a_target_that_may_not_be_on_the_hub(checkpoint: Path) -> None:
    equip(checkpoint)
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.base_model is None and "- target model: someone/target" in card.text


def test_card_without_a_record(tmp_path: Path) -> None:
    export(str(save_tiny_checkpoint(tmp_path / "m", chat_template=False)), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and "tokenizer('{question}'.replace(" in card.text and "Its config.json does not say." in card.text


@pytest.mark.parametrize(
    ("origin", "shown"),
    [("{}/runs/target", "target"), ("target/", "target"), ("../x", "x"), ("someone/target", "someone/target")],
)
def test_local_paths_are_not_exported(checkpoint: Path, tmp_path: Path, monkeypatch, origin: str, shown: str) -> None:
    """Only folder names are exported, and results of the original still count as the export's."""
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path)
    record = MADE | {"target_model": origin.format(tmp_path), "base_model": str(tmp_path / "base")}
    write_json(checkpoint / "config.json", json.loads((checkpoint / "config.json").read_text()) | {RECORD: record})
    export(str(checkpoint), tmp_path / "out")
    written = files(tmp_path / "out")
    assert json.loads(written["config.json"])[RECORD] == MADE | {"target_model": shown, "base_model": "base"}
    assert f"- target model: {shown}\n" in written["README.md"].decode()
    assert not any(str(tmp_path).encode() in content for content in written.values())
    result = {"settings": {}, "summary": {}, "record": record}
    write_json(tmp_path / "result.json", result)
    assert read_reports([tmp_path / "result.json"], json.loads(written["config.json"])[RECORD]) == [result]


def test_published_checkpoint_gets_its_record(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    write_json(checkpoint / "config.json", {key: value for key, value in config.items() if key != RECORD})
    monkeypatch.setattr("cllm.serving.contents.snapshot_download", lambda name, **options: str(checkpoint))
    export("cllm/consistency-llm-7b-math", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "config.json").read_text())[RECORD]
    assert record == {"prompt_template": "abel", "task": "gsm8k", "target_model": "GAIR/Abel-7B-001"}
    assert "- target model: GAIR/Abel-7B-001" in (tmp_path / "out" / "README.md").read_text()
