"""`cllm make` on a tiny model: what it leaves, interruptions, where nothing is faster, and what is refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import generate
from commands import question_rows, refused, write_rows
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import EOS_ID, save_tiny_checkpoint

import cllm
from cllm.adapter import ADAPTER, ADAPTER_WEIGHTS, attached
from cllm.cli import make as command
from cllm.decoding import JacobiDecoder
from cllm.errors import UsageError
from cllm.making.make import CPU, WORK, Making, too_slow
from cllm.making.plan import make_plan
from cllm.models import DATA, REASON, default_width, folder_record, load_model, load_tokenizer
from cllm.prompts import PromptTemplate
from cllm.training.build import build_trainer
from cllm.training.lossless import LosslessTrainer
from cllm.trajectory.store import read_rows

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 16


class Killed(BaseException):
    """No handler in the code catches it."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("target") / "m", seed=3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("prompts") / "p.jsonl", [{"prompt": f"Why {n * n}?"} for n in range(20)])


@pytest.fixture(scope="module")
def made(target: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "out"
    run(target, prompts, output)
    return output


def run(target: Path, prompts: Path, output: Path, **options) -> dict:
    return cllm.make(str(target), prompts, output, **{"max_new_seq_len": LENGTH, "device": "cpu", "dtype": "float32"} | options)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def figures(folder: Path) -> dict:
    return json.loads((folder / "make.json").read_text())


def responses(folder: Path) -> dict[str, list[int]]:
    return {row.row_id: row.response_ids for row in read_rows(folder / WORK / "responses")}


def same_adapter(folder: Path, other: Path) -> bool:
    one, two = (load_file(each / ADAPTER_WEIGHTS) for each in (folder, other))
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_twenty_prompts_end_with_a_sensible_report(made: Path, target: Path) -> None:
    found, plan = figures(made), figures(made)["plan"]
    assert (plan["prompts"], plan["held_out"], plan["epochs"]) == (16, 4, 10) and len(responses(made)) == 16
    assert found["same_as_ar"] == 1.0 and found["tokens_per_forward"] >= 1 and not found["divergences"]
    assert found["environment"]["device"] == "cpu" and found["dtype"] == "float32" and found["measured"] == 4
    assert set(found["seconds"]) == {"prompts", "plan", "responses", "adapter", "tune", "measure"}
    assert (found["stored_width"] == 1) == (found["reason"] is not None)
    assert {ADAPTER, ADAPTER_WEIGHTS, "config.json", "tokenizer.json", "README.md", "make.json"} <= files(made)
    assert not [name for name in files(made) if "checkpoint-" in name]
    card = ModelCard.load(made / "README.md").text
    assert "prompts of p.jsonl" in card and f"- target model: {target.name}\n" in card and "not faster than" in card
    assert "tokens per forward" in card and "cllm serve PATH" in card and "--format uno" in card


def test_the_result_writes_the_base_models_text_with_the_window_that_is_stored(made: Path, target: Path) -> None:
    model, tokenizer = load_model(str(made), device="cpu"), load_tokenizer(str(made))
    assert attached(model) is not None and default_width(folder_record(made)) == figures(made)["stored_width"]
    prompt = PromptTemplate("chat").encode([{"role": "user", "content": "And 5?"}], tokenizer)
    expected = generate(load_model(str(target), device="cpu"), prompt, 24, [EOS_ID])
    for options in ({}, {"block_size": 6, "drafts": 7}):
        (result,) = JacobiDecoder(model, eos_token_ids=[EOS_ID], **options).generate([prompt], max_new_tokens=24)
        assert result.token_ids == expected


def test_it_does_nothing_twice(made: Path, target: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    monkeypatch.setattr("cllm.making.make.train", None)
    assert run(target, prompts, made) == figures(made)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_out_of_memory_fewer_examples_are_trained_on_at_once(
    target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a step is about as many as before."""
    build, steps = build_trainer, set()

    def scarce(*parts, **options):
        size, accumulation = parts[-1].per_device_train_batch_size, parts[-1].gradient_accumulation_steps
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        steps.add((size, accumulation))
        return build(*parts, **options)

    for module in ("cllm.making.make", "cllm.training.build"):
        monkeypatch.setattr(f"{module}.build_trainer", scarce)
    assert run(target, prompts, tmp_path / "out")["plan"]["at_once"] == 1 and steps == {(1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_random_moment_it_ends_with_the_same_files(
    made: Path, target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Before a file that is complete gets its name, or before a training step."""
    left = [random.Random(f"kill {seed}").randrange(50 * seed, 50 * (seed + 1))]  # early and late in the run

    def mortal(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(LosslessTrainer, "training_step", mortal(LosslessTrainer.training_step))
        run(target, prompts, tmp_path / "out")
    found = run(target, prompts, tmp_path / "out")
    assert {name for name in files(tmp_path / "out") if "/responses/" not in name} == {
        name for name in files(made) if "/responses/" not in name
    }
    assert responses(tmp_path / "out") == responses(made) and same_adapter(tmp_path / "out", made)
    assert found["same_as_ar"] == 1.0


@pytest.mark.slow
def test_a_process_that_is_killed_five_times(made: Path, target: Path, prompts: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cllm", "make", target, prompts, tmp_path / "out", "--max_new_seq_len", LENGTH]
    words = [*map(str, words), "--device", "cpu", "--dtype", "float32"]
    draw, environment = random.Random(0), os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(5):
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(6, 14))  # the imports take some five seconds
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(words, env=environment, check=True, capture_output=True)
    assert same_adapter(tmp_path / "out", made) and responses(tmp_path / "out") == responses(made)


def test_where_nothing_is_faster_width_1_is_stored_and_the_reason_said(
    made: Path, target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = JacobiDecoder.generate

    def slow(self: JacobiDecoder, prompts, **options):
        time.sleep(0.05 * (self.block_size > 1) * len(prompts))
        return decode(self, prompts, **options)

    monkeypatch.setattr(JacobiDecoder, "generate", slow)
    found = run(target, prompts, tmp_path / "out")
    assert found["stored_width"] == 1 and found["width"] > 1
    assert "not faster than AR beyond noise: speedup" in found["reason"] and "times AR's time per forward" in found["reason"]
    assert found["reason"] in " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert folder_record(tmp_path / "out")[REASON] == found["reason"]
    decoder = JacobiDecoder(load_model(str(tmp_path / "out"), device="cpu"))
    assert (decoder.block_size, decoder.step.drafts, decoder.step.adapter) == (1, 0, None)


@pytest.mark.parametrize(
    ("interval", "slow"), [(None, True), ((0.9, 1.3), True), ((1.0, 1.3), True), ((1.01, 1.3), False), ((0.5, 0.9), True)]
)
def test_faster_beyond_noise(interval: tuple[float, float] | None, slow: bool) -> None:
    found = {"speedup_interval": interval, "speedup": 1.1, "tokens_per_forward": 1.65}
    assert (too_slow(found) is not None) == slow
    assert not slow or "1.50 times AR's time per forward" in str(too_slow(found))


def test_a_dry_run_stops_at_the_plan_which_the_real_one_has(target: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    words = [str(word) for word in (target, prompts, tmp_path / "out", "--max_new_seq_len", LENGTH, "--device", "cpu")]
    command.main([*words, "--dry_run"])
    printed = capsys.readouterr().out
    assert "16 to learn from, in 10 epochs; about 4 to measure on" in printed and "minutes" in printed and "memory" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {WORK}
    left = {"prompts.jsonl", "held_out.jsonl", "prompts.json", "plan.json", "responses", "stages.json"}
    assert {path.name for path in (tmp_path / "out" / WORK).iterdir()} == left
    plan = (tmp_path / "out" / WORK / "plan.json").read_bytes()
    command.main(words)
    assert (tmp_path / "out" / WORK / "plan.json").read_bytes() == plan and "on 4 held-out prompts" in capsys.readouterr().out


def test_the_responses_that_were_timed_are_kept(
    made: Path, target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllm.making.make.CPU", replace(CPU, collected=6))
    run(target, prompts, tmp_path / "out", dry_run=True)
    timed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / WORK / "responses").glob("part-*")}
    assert len(responses(tmp_path / "out")) == 6
    run(target, prompts, tmp_path / "out")
    assert responses(tmp_path / "out") == responses(made) and {path: path.stat().st_mtime_ns for path in timed} == timed


def test_what_is_timed(target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses that are kept count once, and training steps are of average length on a CPU."""
    told, build, plan, timed = {}, build_trainer, make_plan, Making._timed_responses
    monkeypatch.setattr(Making, "_timed_responses", lambda self, count: timed(self, count) and 1000.0)
    monkeypatch.setattr("cllm.making.make.build_trainer", lambda inputs, args: told.update(args=args) or build(inputs, args))
    monkeypatch.setattr("cllm.making.make.make_plan", lambda costs, *facts: told.update(costs=costs) or plan(costs, *facts))
    run(target, prompts, tmp_path / "out", dry_run=True)
    assert told["args"].train_sampling_strategy == "random"
    assert told["costs"].response == 1000 / 16 and -1000 < told["costs"].spent < 0 and told["costs"].sampled == 16


def test_tuning_decodes_only_the_beginning_of_long_responses(
    target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(args):
        raise Killed(args.max_new_seq_len, args.data_size)

    monkeypatch.setattr("cllm.making.make.tune", told)
    with pytest.raises(Killed, match=r"\(64, 8\)"):
        run(target, prompts, tmp_path / "out", max_new_seq_len=100)


def test_other_prompts_start_anew(made: Path, target: Path, tmp_path: Path) -> None:
    first, second = (write_rows(tmp_path / name, question_rows(count)) for name, count in (("a", 12), ("b", 15)))
    assert run(target, f"gsm8k:{first}", tmp_path / "out")["plan"]["prompts"] == 10
    again = run(target, [f"gsm8k:{second}"], tmp_path / "out")
    assert again["plan"]["prompts"] == 12 == len(responses(tmp_path / "out"))
    assert folder_record(tmp_path / "out")[DATA] == ["b"]


def test_a_held_out_file_that_overlaps(target: Path, prompts: Path, tmp_path: Path, caplog) -> None:
    apart = write_rows(tmp_path / "h.jsonl", [{"prompt": f"Why {n * n}?"} for n in range(17, 23)])
    with caplog.at_level("INFO"):
        found = run(target, prompts, tmp_path / "out", held_out=apart, dry_run=True)
    assert (found["plan"]["prompts"], found["plan"]["held_out"]) == (17, 6)
    assert "17 prompts to learn from, 6 held out; 3 held out as well" in caplog.text


def broken(tmp_path: Path, target: Path, prompts: Path) -> dict[str, tuple[list, str]]:
    """Words for the command, and what its error says."""
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": f"{n}?"} for n in range(9)])
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": f"{n}" + 300 * "x"} for n in range(12)])
    talks = write_rows(tmp_path / "talks.jsonl", [{"messages": [{"role": "user", "content": f"{n}?"}]} for n in range(12)])
    other = write_rows(tmp_path / "other.jsonl", [{"text": "x"}])
    (tmp_path / "empty.jsonl").touch()
    bare = save_tiny_checkpoint(tmp_path / "bare", chat_template=False)
    return {
        "empty": ([target, tmp_path / "empty.jsonl"], "empty file"),
        "other": ([target, other], "no usable row"),
        "few": ([target, few], "at least 10 prompts are needed, 2 of them held out; got 8 to learn from and 1 held out"),
        "long": ([target, long], "got 0 to learn from and 0 held out; 12 too long for the model's context"),
        "talks": ([bare, talks], "12 prompts are conversations"),
        "nowhere": ([target, tmp_path / "nowhere.jsonl"], "no such file"),
        "model": ([tmp_path / "nothing", prompts], "must be a checkpoint folder or a hub name"),
    }


def test_bad_input(target: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (words, message) in broken(tmp_path, target, prompts).items():
        error = refused(capsys, command.main, *words, tmp_path / "out" / name, "--device", "cpu")
        assert message in error, (name, error)
    same = refused(capsys, command.main, target, prompts, tmp_path / "out" / "same", "--held_out", prompts)
    assert "got 0 to learn from and 20 held out; 20 held out as well" in same
    options = {"--minutes 0": "minutes must be a number above 0, got 0.0", "--max_new_seq_len 4": "must be >= 8, got 4"}
    for words, message in options.items():
        assert message in refused(capsys, command.main, target, prompts, tmp_path / "out" / "x", *words.split())
    assert "OUTPUT must be new, empty" in refused(capsys, command.main, target, prompts, target)


def test_a_base_without_a_chat_template(prompts: Path, tmp_path: Path) -> None:
    bare = save_tiny_checkpoint(tmp_path / "bare", chat_template=False)
    talks = write_rows(tmp_path / "talks.jsonl", [{"messages": [{"role": "user", "content": f"{n}?"}]} for n in range(12)])
    run(bare, prompts, tmp_path / "plain", dry_run=True)
    run(bare, talks, tmp_path / "told", prompt_template="Q: {question}\nA:", dry_run=True)
    templates = [json.loads((tmp_path / n / WORK / "prompts.json").read_text())["prompt_template"] for n in ("plain", "told")]
    assert templates == ["{question}\n", "Q: {question}\nA:"]


def test_a_time_that_is_too_short(target: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="minutes must be at least"):
        run(target, prompts, tmp_path / "out", minutes=0.0001)


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["16k"], indirect=True)
def test_a_disk_that_is_full_at_every_stage(
    made: Path, target: Path, prompts: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk grows by a little whenever it was full; in the end everything is there as ever."""
    words = [target, prompts, small_disk / "out", "--max_new_seq_len", LENGTH, "--device", "cpu", "--dtype", "float32"]
    size, full = 16, 0
    while True:
        try:
            command.main([str(word) for word in words])
            break
        except SystemExit as exit_:
            error = capsys.readouterr().err
            assert exit_.code == 2 and ("no space left" in error.lower() or "cannot write" in error), error
        size, full = 2 * size, full + 1
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)
    assert full > 2 and same_adapter(small_disk / "out", made) and responses(small_disk / "out") == responses(made)


@pytest.mark.slow
def test_two_processes_make_one_adapter(made: Path, target: Path, prompts: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    words = ["-m", "cllm", "make", target, prompts, tmp_path / "out", "--max_new_seq_len", LENGTH, "--dtype", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, *map(str, words), "--device", "cpu"], env=environment, check=True, timeout=500)
    assert responses(tmp_path / "out") == responses(made) and figures(tmp_path / "out")["same_as_ar"] == 1.0
    assert attached(load_model(str(tmp_path / "out"), device="cpu")) is not None


def test_several_gpus_start_accelerate(monkeypatch: pytest.MonkeyPatch, target: Path, prompts: Path, tmp_path: Path) -> None:
    started: list[list[str]] = []

    def execute(path: str, words: list[str]) -> None:
        started.append(words)
        raise Killed

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(os, "execv", execute)
    words = [str(word) for word in (target, prompts, tmp_path / "out")]
    with pytest.raises(Killed):
        command.main(words)
    assert started[0][1:] == ["-m", "accelerate.commands.launch", "--num_processes", "4", "-m", "cllm", "make", *words]
    with pytest.raises(Killed):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr("cllm.making.make.make", lambda *args, **options: (_ for _ in ()).throw(Killed))
        command.main(words)
    assert len(started) == 1
