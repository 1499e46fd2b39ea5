"""The train command on trajectories of a tiny model, in either form."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from commands import question_rows, refused, write_rows
from tiny import save_tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm.adapter import LOSSLESS as LOSSLESS_KEY
from cllm.adapter import attached, fingerprint
from cllm.cli import collect, train
from cllm.errors import UsageError
from cllm.models import default_guess, default_width, load_model, read_record, vocabulary_stamp
from cllm.trajectory.record import Dropped
from cllm.trajectory.store import TrajectoryWriter

LAUNCHER = Path(__file__).parents[2] / "cllm" / "train_cllm.sh"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", seed=3)


@pytest.fixture(scope="module")
def collected(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trajectories in t/ and in the published form in p.json."""
    folder = tmp_path_factory.mktemp("collected")
    data = write_rows(folder / "d.jsonl", question_rows(8))
    words = ["--model", model_dir, "--filename", data, "--output", folder / "t", "--published", folder / "p.json"]
    sizes = ["--max_new_tokens", 4, "--max_new_seq_len", 12, "--device", "cpu"]
    collect.main([*map(str, words + sizes), "--use_aug", "--use_labels"], task="gsm8k")
    return folder


@pytest.fixture
def run(model_dir: Path, collected: Path, tmp_path: Path) -> Callable[..., Path]:
    def start(*more: object, trajectories: str = "t", **options: object) -> Path:
        given = {
            "model": model_dir,
            "trajectories": collected / trajectories,
            "output_dir": tmp_path / "out",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "use_cpu": "true",
            "report_to": "none",
            "save_strategy": "no",
        } | options
        train.main([*(f"--{name}={value}" for name, value in given.items()), *map(str, more)])
        return Path(str(given["output_dir"]))

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_result_is_a_plain_checkpoint(run, model_dir: Path, capsys) -> None:
    out = run()
    assert f"CLLM saved in {out}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM" and not same(weights(out), weights(model_dir))
    record = read_record(model.config)
    assert (record["block_size"], record["prompt_template"], record["task"]) == (4, "chat", "gsm8k")
    assert (record["target_model"], record["responses"], record["consistency"]) == (model_dir.name, 8, "global")
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert model.generation_config.eos_token_id == 2
    assert (out / "custom_generate" / "generate.py").is_file() and "- block size: 4" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"consistency": "local"},
        {"teacher": "self", "ar_loss": "fixed_point"},
        {"use_gt_labels": "true"},
        {"ar_loss": "labels", "consistency": "local", "states_per_block": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("trajectories", ["t", "p.json"])
def test_either_form_with_every_loss(run, model_dir: Path, options, trajectories) -> None:
    out = run(trajectories=trajectories, block_size=4, **options)
    trained = weights(out)
    assert all(value.isfinite().all() for value in trained.values()) and not same(trained, weights(model_dir))


def test_the_published_form_trains_the_same(run, tmp_path: Path) -> None:
    """The rows come back in the order of their ids, and so do their states: the weights are the same."""
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "teacher": "self", "ar_loss": "labels"}
    folder = run(**options, states_per_block=100, output_dir=tmp_path / "a")
    published = run(**options, states_per_block=100, output_dir=tmp_path / "b", trajectories="p.json", block_size=4)
    assert same(weights(folder), weights(published))


def test_a_cllm_decodes_from_what_its_trajectories_started_from(model_dir: Path, run, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", question_rows(4))
    words = ["--model", model_dir, "--filename", data, "--output", tmp_path / "t", "--guess", "uniform", "--device", "cpu"]
    collect.main([*map(str, words), "--max_new_tokens", "4", "--max_new_seq_len", "12"], task="gsm8k")
    new = {"divergence": "hard", "state_choice": "noise", "random_block_size": "true"}
    record = read_record(AutoModelForCausalLM.from_pretrained(run(trajectories=tmp_path / "t", **new)).config)
    assert default_guess(record) == "uniform"
    assert new | {"random_block_size": True} == {name: record[name] for name in new}


def test_resuming_from_a_checkpoint(run, tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "max_steps": 3}
    whole = run(**steps, output_dir=tmp_path / "whole")
    run(**steps | {"max_steps": 2}, output_dir=tmp_path / "parts")
    torn = tmp_path / "parts" / "checkpoint-7"  # a kill while it was written
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (torn / "trainer_state.json").write_text('{"global_step": ')
    for name in ("checkpoint-2-backup", "checkpoint-9 (copy)", "checkpoint-best"):  # whose they are only their owner knows
        shutil.copytree(tmp_path / "parts" / "checkpoint-1", tmp_path / "parts" / name)
    parts = run(**steps, output_dir=tmp_path / "parts", resume_from_checkpoint="True")
    assert json.loads((parts / "trainer_state.json").read_text())["global_step"] == 3
    assert same(weights(whole), weights(parts))
    from_folder = run(**steps, output_dir=tmp_path / "third", resume_from_checkpoint=whole / "checkpoint-2")
    assert same(weights(whole), weights(from_folder))


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(run, tmp_path: Path, capsys) -> None:
    out = run(save_strategy="steps", save_steps=1)
    state = out / "checkpoint-2" / "trainer_state.json"
    state.unlink()
    state.symlink_to(state.name)  # a loop, which the system refuses to follow
    with pytest.raises(SystemExit):
        run(resume_from_checkpoint="True")
    assert f"cannot read {out / 'checkpoint-2'}: Too many levels of symbolic links" in capsys.readouterr().err


def test_resuming_without_a_checkpoint_starts(run) -> None:
    assert (run(resume_from_checkpoint="True") / "model.safetensors").is_file()


def test_a_published_file_needs_its_block_size(run, model_dir: Path, collected: Path, tmp_path: Path, capsys) -> None:
    words = ["--model", model_dir, "--trajectories", collected / "p.json", "--output_dir", tmp_path / "out"]
    assert "does not say its block size; pass --block_size" in refused(capsys, train.main, *words, "--use_cpu")
    message = refused(capsys, train.main, *words, "--use_cpu", "--block_size", 5)
    assert "block_size is 5, but" in message and "has blocks of 4 tokens" in message
    assert not (tmp_path / "out").exists()


def test_labels_missing_in_a_published_file(run, collected: Path, tmp_path: Path, capsys, model_dir: Path) -> None:
    items = [item | {"labels_ids": None} for item in json.loads((collected / "p.json").read_text())]
    for item in items:
        del item["labels_ids"]
    (tmp_path / "bare.json").write_text(json.dumps(items))
    words = ["--model", model_dir, "--trajectories", tmp_path / "bare.json", "--output_dir", tmp_path / "out"]
    message = refused(capsys, train.main, *words, "--block_size", 4, "--use_gt_labels", "--use_cpu")
    assert "collect the trajectories with --use_labels" in message


def test_ids_beyond_the_vocabulary(collected: Path, tmp_path: Path, capsys) -> None:
    model = save_tiny_checkpoint(tmp_path / "m", vocab_size=120)
    items = json.loads((collected / "p.json").read_text())
    for item in items:
        item["prompt_ids"][0][0] = 200
        item.pop("complete_teacher_output_ids")
    (tmp_path / "other.json").write_text(json.dumps(items))
    words = ["--model", model, "--trajectories", tmp_path / "other.json", "--output_dir", tmp_path / "out"]
    message = refused(capsys, train.main, *words, "--block_size", 4, "--use_cpu")
    assert "token id 200, but the model's vocabulary has 120 tokens" in message


def test_lora_gives_a_plain_checkpoint_and_resumes(run, model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = {"lora_r": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    out = run(**options)
    record = read_record(AutoModelForCausalLM.from_pretrained(out).config)
    assert (record["lora_r"], record["block_size"]) == (2, 4) and not (out / "adapter_config.json").exists()
    assert (out / "custom_generate" / "generate.py").is_file() and not same(weights(out), weights(model_dir))
    resumed = run(**options, output_dir=tmp_path / "resumed", resume_from_checkpoint=out / "checkpoint-1")
    assert equal(weights(out), weights(resumed))
    adapter = run(**options, output_dir=tmp_path / "adapter", merge_lora="false", gradient_checkpointing="true")
    assert (adapter / "adapter_config.json").is_file() and not (adapter / "model.safetensors").exists()
    assert same(load_model(str(adapter)).state_dict(), weights(out))


def test_an_adapter_as_target_model_and_all_weights_where_an_adapter_was(run, model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapter = run(lora_r=2, merge_lora="false", learning_rate=1e-2, output_dir=tmp_path / "adapter")
    target = load_model(str(adapter)).state_dict()
    again = run(lora_r=2, model=adapter, learning_rate=0, output_dir=tmp_path / "again")
    assert same(target, weights(again)) and not same(target, weights(model_dir))
    with pytest.raises(UsageError, match="holds a LoRA adapter, which cannot be merged into weights in 4 bits"):
        load_model(str(adapter), quantization=object())
    run(learning_rate=1e-2, output_dir=adapter)
    (adapter / "README.md").write_text("mine")
    run(learning_rate=1e-2, output_dir=adapter)
    assert (adapter / "README.md").read_text() == "mine"
    assert not (adapter / "adapter_config.json").exists() and not same(target, load_model(str(adapter)).state_dict())


def test_lora_modules_that_do_not_exist(model_dir: Path, collected: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("peft")
    words = ["--model", model_dir, "--trajectories", collected / "t", "--output_dir", tmp_path / "out", "--use_cpu"]
    message = refused(capsys, train.main, *words, "--lora_r", 2, "--lora_target_modules", "attn")
    assert "has no attn; choose from down_proj, gate_proj" in message


def test_trajectories_of_another_tokenizer(model_dir: Path, collected: Path, tmp_path: Path, capsys) -> None:
    """Same number of tokens, other meanings. A folder that does not say is taken as it is."""
    folder = shutil.copytree(collected / "t", tmp_path / "t")
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["vocabulary"] == vocabulary_stamp(AutoTokenizer.from_pretrained(model_dir))
    (folder / "settings.json").write_text(json.dumps(settings | {"vocabulary": "0123", "model": "other"}))
    words = ["--model", model_dir, "--trajectories", folder, "--output_dir", tmp_path / "out", "--use_cpu"]
    message = refused(capsys, train.main, *words)
    assert "made with the tokenizer of other" in message and not (tmp_path / "out").exists()
    del settings["vocabulary"]
    (folder / "settings.json").write_text(json.dumps(settings))
    train.main([*map(str, words), "--max_steps=1", "--save_strategy=no", "--report_to=none"])


def test_a_block_size_other_than_the_stored_one(model_dir: Path, collected: Path, tmp_path: Path, capsys) -> None:
    words = ["--model", model_dir, "--trajectories", collected / "t", "--output_dir", tmp_path / "out", "--use_cpu"]
    message = refused(capsys, train.main, *words, "--block_size", 5)
    assert "block_size is 5, but" in message and "was collected with 4" in message


def test_nothing_left_to_train_on(model_dir: Path, tmp_path: Path, capsys) -> None:
    with TrajectoryWriter(tmp_path / "t", {"block_size": 4}, resume=False) as writer:
        writer.write([], [Dropped("a", "repetition"), Dropped("b", "empty response")])
    words = ["--model", model_dir, "--trajectories", tmp_path / "t", "--output_dir", tmp_path / "out", "--use_cpu"]
    assert "no rows to train on; all 2 were dropped" in refused(capsys, train.main, *words)


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_no_number_stops_the_run(run, tmp_path: Path, capsys, logging_steps: int) -> None:
    """At the first log or checkpoint behind it; what was saved before is kept."""
    with pytest.raises(SystemExit) as stopped:
        run(learning_rate=1e30, max_steps=5, save_strategy="steps", save_steps=1, logging_steps=logging_steps)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "no longer finite" in error and "Lower --learning_rate (1e+30)" in error
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def kill_at(model_dir: Path, collected: Path, out: Path, moment: str, **options: object) -> None:
    """Run the command in a process of its own, which gets SIGKILL at a moment in step 2: in training or in saving."""
    words = [f"--model={model_dir}", f"--trajectories={collected / 't'}", f"--output_dir={out}"]
    words += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run([sys.executable, "-c", KILLED, moment, *words], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


KILLED = """
import os, signal, sys
import torch
import yaml
from transformers import Trainer
from cllm.cli import train

def killing(kind, name):
    do = getattr(kind, name)
    def act(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(self, *args, **kwargs)
    setattr(kind, name, act)

killing(Trainer, sys.argv[1])
train.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training_step", "_save_rng_state"])
def test_killed_and_resumed_equals_uninterrupted(run, model_dir: Path, collected: Path, tmp_path: Path, moment: str) -> None:
    """Bit for bit, data order included: from the last whole checkpoint, in the middle of the second epoch."""
    steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "per_device_train_batch_size": 3}
    steps |= {"learning_rate": 1e-3, "use_cpu": "true", "report_to": "none", "train_sampling_strategy": "group_by_length"}
    kill_at(model_dir, collected, tmp_path / "out", moment, **steps)
    torn = tmp_path / "out" / "checkpoint-2"
    assert torn.exists() and (torn / "trainer_state.json").exists() == (moment == "training_step")
    resumed = run(**steps, resume_from_checkpoint="True")
    assert equal(weights(resumed), weights(run(**steps, output_dir=tmp_path / "whole")))


def test_logs_go_where_report_to_says_and_nowhere_else(run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logs = "tfevents"
    assert not list(run().rglob(f"*{logs}*"))
    assert list(run(report_to="tensorboard", logging_steps=1).rglob(f"*{logs}*"))


@pytest.mark.parametrize("config", sorted((LAUNCHER.parent / "configs").iterdir()), ids=lambda path: path.stem)
def test_the_ready_configurations_are_what_accelerate_reads(config: Path) -> None:
    loaded = load_config_from_file(str(config))
    assert loaded.num_processes == -1  # it refuses to start unless --num_processes is given, as the launcher does
    kind = "FSDP" if config.stem.startswith("fsdp") else "DEEPSPEED"
    assert loaded.distributed_type == kind
    options = {action.dest for action in launch_command_parser()._actions}
    given = loaded.fsdp_config or loaded.deepspeed_config
    assert given and not set(given) - options


@pytest.mark.slow
def test_the_launcher(model_dir: Path, collected: Path, tmp_path: Path) -> None:
    words = [str(model_dir), str(collected / "t"), str(tmp_path / "out"), "4"]
    more = ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--save_strategy", "no"]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", str(LAUNCHER), *words, *more], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "CLLM saved in" in done.stdout and (tmp_path / "out" / "model.safetensors").is_file()
    short = subprocess.run(["bash", str(LAUNCHER), *words[:2]], capture_output=True, text=True, env=environment)
    assert short.returncode == 2 and short.stderr.startswith("usage: bash train_cllm.sh MODEL TRAJECTORIES")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora_r", "2")])
def test_the_launcher_with_weights_in_shards(collected: Path, tmp_path: Path, lora: tuple[str, ...]) -> None:
    """ZeRO-3: the model is loaded in shards, its frozen target whole, and what is saved is what one process saves."""
    pytest.importorskip("deepspeed")
    model = save_tiny_checkpoint(tmp_path / "tied", seed=3, tie_word_embeddings=True)
    more = ["--max_steps=2", "--optim=adamw_torch", "--learning_rate=1e-3", "--lr_scheduler_type=constant", *lora]
    more += ["--use_cpu", "--report_to=none", "--save_strategy=no"]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    shards = {"NUM_PROCESSES": "2", "ACCELERATE_ARGS": f"--config_file {LAUNCHER.parent / 'configs' / 'zero3.yaml'}"}
    words = [str(model), str(collected / "t"), str(tmp_path / "two"), "4", *more, "--per_device_train_batch_size=2"]
    done = subprocess.run(["bash", str(LAUNCHER), *words], capture_output=True, text=True, env=environment | shards)
    assert done.returncode == 0, done.stderr
    given = {"model": model, "trajectories": collected / "t", "output_dir": tmp_path / "one", "block_size": 4}
    train.main([*(f"--{name}={value}" for name, value in given.items()), *more, "--per_device_train_batch_size=4"])
    before, one, two = weights(model), weights(tmp_path / "one"), weights(tmp_path / "two")
    assert same(one, two) and not same(before, one)


def test_weights_in_host_memory_differ_in_their_place_alone() -> None:
    """Not launched: DeepSpeed compiles its AdamW for minutes first."""
    plain, offload = (yaml.safe_load((LAUNCHER.parent / "configs" / f"{name}.yaml").read_text()) for name in ("zero3", "zero3_offload"))
    for place in ("offload_optimizer_device", "offload_param_device"):
        assert (plain["deepspeed_config"].pop(place), offload["deepspeed_config"].pop(place)) == ("none", "cpu")
    assert plain == offload


PROBE = {"probe_prompts": 3, "probe_length": 8, "probe_every": 1, "max_steps": 3}


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "held_out.jsonl", question_rows(12)[8:])


def test_checks_during_training(run, held_out: Path, tmp_path: Path) -> None:
    out = run(**PROBE, probe_file=held_out, learning_rate=1e-4)
    state = json.loads((out / "trainer_state.json").read_text())
    target, *checks = [entry for entry in state["log_history"] if any(name.startswith("probe") for name in entry)]
    assert [entry["step"] for entry in checks] == [1, 2, 3]
    names = {"tpf", "nll", "repetition", "entropy", "accuracy"}
    assert {f"probe_target_{name}" for name in names} < target.keys()
    assert {f"probe_{name}" for name in names} < checks[0].keys()
    best = state["best_global_step"]
    assert same(weights(out), weights(out / f"best-{best}"))
    assert not same(weights(out), weights(run(output_dir=tmp_path / "plain", learning_rate=1e-4, max_steps=3))) or best == 3


def test_a_rate_far_too_high_stops_the_training(run, held_out: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        run(**PROBE, probe_file=held_out, learning_rate=1.0, on_collapse="stop")
    message = capsys.readouterr().err
    assert "training collapsed by step" in message and "nothing was saved" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on_collapse": "explode"}, "on_collapse must be one of warn, stop, got 'explode'"),
        ({"probe_prompts": -1}, "probe_prompts must be >= 0, got -1"),
        ({"probe_every": 0}, "probe_every must be a number above 0, got 0"),
        ({"probe_prompts": 0, "on_collapse": "stop"}, "nothing is checked during training without --probe_prompts"),
        ({"probe_length": 250}, "none of the 3 prompts leaves room for --probe_length 250"),
        ({"probe_file": "none.jsonl"}, "cannot read none.jsonl"),
        ({"probe_task": "gsm"}, "unknown task 'gsm'"),
    ],
)
def test_checks_that_cannot_be(run, held_out: Path, change: dict[str, object], message: str, capsys, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(**PROBE | {"probe_file": held_out} | change)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


LOSSLESS = {"lossless": "true", "lora_r": 4, "learning_rate": 1e-2}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """What the folder's model drafts with."""
    found = attached(load_model(str(folder)))
    return {f"{kind} {name}": weight for kind in ("down", "up") for name, weight in getattr(found, kind).items()}


def test_lossless_gives_an_adapter_of_the_model_as_it_is(run, model_dir: Path, capsys) -> None:
    pytest.importorskip("peft")
    out = run(**LOSSLESS, states_per_block=3, block_size=3)
    assert f"consistency adapter saved in {out}" in capsys.readouterr().out
    model = load_model(str(out))
    assert equal(model.state_dict(), weights(model_dir)) and max(up.abs().max() for up in adapter(out).values()) > 0
    record = read_record(model.config)
    assert record[LOSSLESS_KEY] and record["base_weights"] == fingerprint(load_model(str(model_dir)))
    names = ("block_size", "prompt_template", "task", "responses", "lora_r", "states_per_block", "distance_decay", "guess")
    assert [record[name] for name in names] == [3, "chat", "gsm8k", 8, 4, 3, 0.8, "context"]
    assert Path(record["target_model"]) == model_dir and AutoTokenizer.from_pretrained(out).chat_template
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} <= {path.name for path in out.iterdir()}
    assert not (out / "model.safetensors").exists()


def test_lossless_resumes_bit_for_bit(run, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = LOSSLESS | {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    out = run(**options)
    resumed = run(**options, output_dir=tmp_path / "resumed", resume_from_checkpoint=out / "checkpoint-1")
    assert equal(adapter(out), adapter(resumed))


def test_responses_alone_are_enough_for_lossless_training(run, model_dir: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("peft")
    data, folder = write_rows(tmp_path / "d.jsonl", question_rows(4)), tmp_path / "t"
    words = ["--model", model_dir, "--filename", data, "--output", folder, "--max_new_tokens", 4, "--max_new_seq_len", 12]
    collect.main([*map(str, words), "--responses_only", "--device", "cpu"], task="gsm8k")
    assert run(**LOSSLESS, trajectories=folder).is_dir()
    with pytest.raises(SystemExit):
        run(trajectories=folder)
    assert "was collected with --responses_only, which is enough for --lossless alone" in capsys.readouterr().err


def test_checks_during_lossless_training(run, held_out: Path) -> None:
    """There is no collapse to look for, and the fastest adapter is the best."""
    pytest.importorskip("peft")
    out = run(**PROBE | LOSSLESS, probe_file=held_out)
    state = json.loads((out / "trainer_state.json").read_text())
    target, *checks = [entry for entry in state["log_history"] if any(name.startswith("probe") for name in entry)]
    assert [entry["step"] for entry in checks] == [1, 2, 3]
    assert {entry["probe_nll"] for entry in checks} == {target["probe_target_nll"]}  # the text is the target's
    best = max(checks, key=lambda entry: entry["probe_tpf"])
    assert state["best_global_step"] == best["step"] and equal(adapter(out / f"best-{best['step']}"), adapter(out))


@pytest.mark.parametrize("options", [LOSSLESS, {"lora_r": 2, "merge_lora": "false"}], ids=["lossless", "lora"])
def test_every_folder_that_a_run_with_an_adapter_keeps_is_a_checkpoint(
    run, model_dir: Path, held_out: Path, options: dict[str, object], tmp_path: Path
) -> None:
    """The weights, the adapter and how to ask it, whatever folder it is loaded in."""
    pytest.importorskip("peft")
    out = run(**PROBE | options, probe_file=held_out, save_strategy="steps", save_steps=1)
    kept = [*out.glob("best-*"), *out.glob("checkpoint-*")]
    assert len(kept) == 4
    for folder in (*kept, out):
        model = load_model(str(folder))
        assert (attached(model) is None) == (options is not LOSSLESS)
        assert equal(model.state_dict(), weights(model_dir)) == (options is LOSSLESS)
        record = read_record(model.config)
        assert record == read_record(load_model(str(out)).config) and default_width(record) == (8 if options is LOSSLESS else 4)
        assert AutoTokenizer.from_pretrained(folder).chat_template


def test_what_lossless_training_refuses(model_dir: Path, collected: Path, run, tmp_path: Path, capsys) -> None:
    pytest.importorskip("peft")

    def message(*more: object, **changes: object) -> str:
        given = {"model": model_dir, "trajectories": collected / "t", "output_dir": tmp_path / "x"} | changes
        return refused(capsys, train.main, *(f"--{name}={value}" for name, value in given.items()), "--lossless", *more)

    assert "unrecognized arguments: --ar_weight" in message("--ar_weight=1")
    assert "unrecognized arguments: --on_collapse" in message("--on_collapse=stop")
    assert "unrecognized arguments: --divergence" in message("--divergence=hard")
    assert "lora_r must be >= 1, got 0" in message("--lora_r=0")
    assert "gradient_checkpointing is on" in message("--gradient_checkpointing")
    again = message("--use_cpu", model=run(**LOSSLESS))
    assert f"holds a consistency adapter, which is not trained on; pass its target model, {model_dir}" in again
    assert "block_size must be below the model's context of 256, got 256" in message("--use_cpu", "--block_size=256")
    assert not (tmp_path / "x").exists()
