"""Probes during training: when they run, what they keep, when they stop training, and that they leave it unchanged."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from training.test_trainer import make_trainer
from transformers import AutoModelForCausalLM

from cllm.cli.command import leave_process_group
from cllm.errors import UsageError
from cllm.training.probe_callback import ProbeCallback, check_steps, state_preserved
from cllm.training.probe_metrics import ProbeMetrics, is_good

TARGET = ProbeMetrics(prompts=4, tpf=1.1, nll=0.4, repetition=0.2, entropy=0.6)
BAD, BROKEN = {"nll": 1.2}, {"nll": 9.0}
OPTIONS = {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-3, "per_device_train_batch_size": 2}


class ScriptedMeasure:
    """Returns the target's metrics first, then the target's metrics with one of ``changes`` per probe."""

    def __init__(self, *changes: dict[str, float]) -> None:
        self.changes = [{}, *changes]

    def __call__(self, model: torch.nn.Module) -> ProbeMetrics:
        model.train()
        torch.rand(3), random.random(), np.random.rand()
        return replace(TARGET, **self.changes.pop(0))


def probed(folder: Path, *changes: dict[str, float], stop: bool = False, **options):
    """A trainer of five steps with a probe after each."""
    trainer = make_trainer(folder, **OPTIONS | options)
    trainer.add_callback(ProbeCallback(trainer, ScriptedMeasure(*changes), tiny_model(seed=9, vocab_size=97), 1, is_good, stop))
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "best" in path.name)


@pytest.mark.parametrize(
    ("planned", "every", "steps"),
    [
        (56, 0.1, [1, 2, 3, 5, 6, 12, 17, 23, 28, 34, 40, 45, 51, 56]),
        (1000, 0.25, [25, 50, 100, 200, 250, 500, 750, 1000]),
        (1000, 400, [40, 80, 160, 320, 400, 800, 1000]),
        (2, 0.1, [1, 2]),
        (3, 10, [1, 2, 3]),
    ],
)
def test_probed_steps(planned: int, every: float, steps: list[int]) -> None:
    assert sorted(check_steps(planned, every)) == steps


def test_the_best_good_model_is_kept(tmp_path: Path) -> None:
    """Step 4 is faster, but its text is not good; step 2 is the fastest of the rest."""
    trainer = probed(tmp_path, {"tpf": 1.2}, {"tpf": 1.5}, {"tpf": 1.4}, {"tpf": 3.0, "nll": 0.8}, {"tpf": 1.3})
    trainer.train()
    assert logged(trainer, "probe_tpf") == [1.2, 1.5, 1.4, 3.0, 1.3] and logged(trainer, "probe_target_tpf") == [1.1]
    assert trainer.state.best_global_step == 2 and kept(tmp_path) == ["best-2"]
    assert json.loads((tmp_path / "best-2" / "probe.json").read_text())["tpf"] == 1.5
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "best-2")
    assert torch.equal(weights(trainer.model), weights(best))


def test_probes_leave_training_unchanged(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, **OPTIONS)
    plain.train()
    trainer = probed(tmp_path, *[{"repetition": 0.3}] * 5, logging_steps=2)  # never good: the last weights stay
    trainer.train()
    assert torch.equal(weights(plain.model), weights(trainer.model))
    assert len(logged(trainer, "consistency_loss")) == 2  # a probe does not swallow the loss of its step


def test_state_preserved() -> None:
    model = tiny_model()
    model.train()
    model.lm_head.eval()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with pytest.raises(ValueError), state_preserved(model):
        model.eval()
        torch.rand(5)
        assert not torch.is_grad_enabled()
        raise ValueError
    assert torch.equal(torch.rand(2), expected) and torch.is_grad_enabled()
    assert model.training and model.model.training and not model.lm_head.training


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ([{}, BROKEN], 2),
        ([{}, {"tpf": float("nan")}], 2),
        ([{}, BAD, BAD], 3),
        ([{}, BAD, {}, BAD, {}], 5),
    ],
)
def test_training_stops_at_collapse(tmp_path: Path, changes: list[dict[str, float]], steps: int, caplog) -> None:
    trainer = probed(tmp_path, *changes, stop=True)
    with caplog.at_level(logging.WARNING, "cllm"):
        trainer.train()
    assert trainer.state.global_step == steps and kept(tmp_path) == ["best-1"]
    assert any("training stops" in message for message in caplog.messages) == (steps < 5)
    assert torch.equal(weights(trainer.model), weights(AutoModelForCausalLM.from_pretrained(tmp_path / "best-1")))


def test_collapse_before_any_good_probe(tmp_path: Path) -> None:
    trainer = probed(tmp_path, BROKEN, stop=True)
    with pytest.raises(UsageError, match="collapsed by step 1 before any good probe"):
        trainer.train()
    assert kept(tmp_path) == []


def test_without_stop_collapse_only_warns(tmp_path: Path, caplog) -> None:
    trainer = probed(tmp_path, BROKEN, BAD, {"nll": 0.7}, {}, {})
    with caplog.at_level(logging.WARNING, "cllm"):
        trainer.train()
    assert [message.split(":")[1] for message in caplog.messages] == [" collapse"] * 2
    assert trainer.state.global_step == 5 and trainer.state.best_global_step == 4


def test_without_a_good_probe_the_last_weights_are_kept(tmp_path: Path, caplog) -> None:
    trainer = probed(tmp_path, *[{"nll": 0.7}] * 5)
    with caplog.at_level(logging.WARNING, "cllm"):
        trainer.train()
    assert caplog.messages == ["no probe was within the margin of the target's quality: keeping the weights of the last step"]
    assert trainer.state.best_global_step is None and kept(tmp_path) == []


def test_resuming_keeps_the_best_so_far(tmp_path: Path) -> None:
    """The run was killed after step 4, while it saved something better; it resumes from step 2 or 3."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    changes = [{"tpf": 1.2}, {"tpf": 1.9}, BAD, {"tpf": 1.4}, {"tpf": 1.5}]
    probed(tmp_path, *changes, **saving).train()
    (tmp_path / ".best-4").mkdir()
    shutil.rmtree(tmp_path / "checkpoint-5")
    for step, then in ((2, changes[2:]), (3, changes[3:])):
        resumed = probed(tmp_path, *then, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.best_global_step == 2 and kept(tmp_path) == ["best-2"]
        assert torch.equal(weights(resumed.model), weights(AutoModelForCausalLM.from_pretrained(tmp_path / "best-2")))
    second = probed(tmp_path, BAD, {}, stop=True, **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.state.global_step == 4  # the second bad probe in a row
    assert logged(second, "probe_target_tpf") == [1.1]


@pytest.mark.parametrize("name", ["best-1-backup", "best-2.old", "best-02", "best-2 (copy)", ".best-1-mine", "best-file-1"])
def test_folders_of_other_names_are_left_alone(tmp_path: Path, name: str) -> None:
    """Beside the best model of an old run, of this one, and of a resumed one."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    saving = {"save_strategy": "steps", "save_steps": 1}
    probed(tmp_path, *[{"tpf": 1.3 + n / 10} for n in range(5)], **saving).train()
    probed(tmp_path, {"tpf": 2.5}, {}, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert kept(tmp_path) == sorted(["best-4", name]) and (tmp_path / name / "mine").is_file()


def test_a_new_run_removes_the_best_of_an_old_one(tmp_path: Path) -> None:
    probed(tmp_path, *[{"tpf": 9.0}] * 5).train()
    trainer = probed(tmp_path, *[{"tpf": 1.3}] * 5)
    trainer.train()
    assert trainer.state.best_metric == 1.3 and kept(tmp_path) == ["best-1"]


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(UsageError, match="leave out --probe_prompts under FSDP and DeepSpeed"):
        ProbeCallback(trainer, ScriptedMeasure(), trainer.model, 1, is_good, stop=False)


@pytest.mark.slow
def test_all_processes_use_the_metrics_of_the_first(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    subprocess.run([*command, __file__, str(tmp_path)], check=True, env=environment, timeout=300)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second) and kept(tmp_path) == ["best-1"]
    assert torch.equal(first, weights(AutoModelForCausalLM.from_pretrained(tmp_path / "best-1")))


if __name__ == "__main__":  # one of two processes of the test above; only the first has metrics
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    trainer = probed(folder, *([{"tpf": 1.5}, BROKEN] if rank == 0 else []), stop=True, per_device_train_batch_size=1)
    trainer.train()
    assert trainer.state.global_step == 2
    torch.save(weights(trainer.model), folder / f"{rank}.pt")
    leave_process_group()
