"""Collection by vLLM, in the same process and from a server, against our engine."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from commands import failed, question_rows, refused, write_rows
from tiny import save_tiny_checkpoint

from cllm.cli import collect
from cllm.engines.follower import LEADER
from cllm.trajectory.record import TrajectoryRow
from cllm.trajectory.store import read_rows

COUNT = 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "d.jsonl", question_rows(COUNT))


def words_of(model: Path, data: Path, output: Path, *more: Any) -> list[str]:
    words = ["--task", "gsm8k", "--model", model, "--filename", data, "--output", output, "--device", "cpu", "--max_new_tokens", 4]
    return [*map(str, words), "--max_new_seq_len", "12", "--batch_size", "3", *map(str, more)]


def run(model: Path, data: Path, output: Path, *more: Any) -> dict[str, TrajectoryRow]:
    collect.main(words_of(model, data, output, *more))
    rows = list(read_rows(output))
    assert len({row.row_id for row in rows}) == len(rows)
    return {row.row_id: row for row in rows}


def started_under(leader: int) -> list[Path]:
    """The processes that follow it."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{LEADER}={leader}\0".encode() in environment.read_bytes():
                found.append(environment)
    return found


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rows_of_our_engine(random_model: Path, data: Path, tmp_path: Path, server: str, monkeypatch, capsys) -> None:
    """The same responses and states, also when the command is killed and resumed. The kill ends vLLM's processes too."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    ours = run(random_model, data, tmp_path / "ours")
    assert run(random_model, data, tmp_path / "server", "--base_url", f"{server}/v1") == ours
    words = words_of(random_model, data, tmp_path / "vllm", "--engine", "vllm")
    killed = subprocess.Popen([sys.executable, "-m", "cllm", "collect", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "vllm").glob("part-*")):
        assert killed.poll() is None
        time.sleep(0.05)
    assert started_under(killed.pid)
    killed.kill()
    killed.wait()
    end = time.monotonic() + 30
    while started_under(killed.pid):
        assert time.monotonic() < end
        time.sleep(0.5)
    assert 0 < len(list(read_rows(tmp_path / "vllm"))) < len(ours)
    assert run(random_model, data, tmp_path / "vllm", "--engine", "vllm") == ours
    assert f"0 of {len(ours)} responses are not what the model here writes greedily" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- without vLLM


class Engine:
    """The part of vLLM's LLMEngine that is used; every request takes as many steps as its response has tokens."""

    opened: list["Engine"] = []

    def __init__(self, settings: Any, responses: dict[tuple[int, ...], list[int]]) -> None:
        self.settings, self.responses = settings, responses
        self.running: dict[str, Iterator[list[int]]] = {}
        self.most, self.aborted = 0, list[str]()
        self.opened.append(self)

    def add_request(self, request_id: str, prompt: dict[str, list[int]], how: Any) -> None:
        assert how.temperature == 0 and how.max_tokens == 12
        response = self.responses[tuple(prompt["prompt_token_ids"])]
        self.running[request_id] = iter([[]] * (len(response) - 1) + [response])
        self.most = max(self.most, len(self.running))

    def step(self) -> list[Any]:
        finished = {name: ids for name, steps in self.running.items() if (ids := next(steps))}
        self.running = {name: steps for name, steps in self.running.items() if name not in finished}
        return [SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tuple(ids))]) for name, ids in finished.items()]

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model whose responses are all worth keeping."""
    return save_tiny_checkpoint(tmp_path / "m", seed=3)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package called vllm with :class:`Engine`; called with the rows whose responses it writes."""

    def install(rows: dict[str, TrajectoryRow]) -> None:
        responses = {tuple(row.prompt_ids): row.response_ids for row in rows.values()}
        engine = SimpleNamespace(from_engine_args=lambda settings: Engine(settings, responses))
        parts: dict[str, dict[str, Any]] = {
            "vllm": {"SamplingParams": SimpleNamespace},
            "vllm.engine": {},
            "vllm.engine.arg_utils": {"EngineArgs": SimpleNamespace},
            "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)},
            "vllm.v1": {},
            "vllm.v1.engine": {},
            "vllm.v1.engine.llm_engine": {"LLMEngine": engine},
        }
        for name, content in parts.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("cllm.engines.install.find_spec", lambda name: name)
        Engine.opened.clear()

    return install


def test_an_engine_in_the_same_process(vllm, model, data, tmp_path) -> None:
    ours = run(model, data, tmp_path / "ours")
    vllm(ours)
    assert run(model, data, tmp_path / "t", "--engine", "vllm", "--tensor_parallel_size", 2) == ours
    (engine,) = Engine.opened
    assert engine.most == 3 and not engine.aborted  # a request joins as soon as another has ended
    assert engine.settings.max_num_seqs == 3 and engine.settings.tensor_parallel_size == 2 and engine.settings.dtype == "float32"


def test_an_engine_that_fails(vllm, model, data, tmp_path, capsys, monkeypatch) -> None:
    vllm({})
    monkeypatch.setattr(sys.modules["vllm.v1.engine.llm_engine"].LLMEngine, "from_engine_args", lambda settings: 1 / 0)  # type: ignore[attr-defined]
    words = ["--task", "gsm8k", "--model", model, "--filename", data, "--output", tmp_path / "t", "--engine", "vllm", "--device", "cpu"]
    assert "vLLM cannot run" in failed(capsys, collect.main, *words)


def test_vllm_that_is_not_installed(model, data, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("cllm.engines.install.find_spec", lambda name: None)
    words = ["--task", "gsm8k", "--model", model, "--filename", data, "--output", tmp_path / "t", "--engine", "vllm", "--device", "cpu"]
    assert "pip install -e .[vllm]" in refused(capsys, collect.main, *words)
    assert not (tmp_path / "t").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "works in one process" in refused(capsys, collect.main, *words)
