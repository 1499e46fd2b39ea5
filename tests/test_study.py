"""The study of training options: what it counts, that it resumes, and its table."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import sql_questions
from commands import refused
from tiny import save_tiny_checkpoint

from cllm.cli import collect

STUDY: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "study.py"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("study")
    model = save_tiny_checkpoint(folder / "m", seed=3, max_position_embeddings=1024)
    data = folder / "d"
    sql_questions.main([str(data), "6", "3"])
    for guess in ("context", "uniform"):
        given = ["--model", model, "--filename", data, "--output", f"{folder}/t{'_uniform' * (guess == 'uniform')}"]
        sizes = ["--max_new_tokens", 4, "--max_new_seq_len", 12, "--guess", guess, "--device", "cpu"]
        collect.main([*map(str, given + sizes)], task="spider")
    given = ["--model", model, "--trajectories", folder / "t", "--task", "spider", "--filename", data]
    return [*map(str, given), "--prompts", "3", "--length", "12", "--device", "cpu", "--output", str(folder / "out")]


def test_a_study_from_runs_to_table(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(words[-1])
    flags = ["--", "--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu"]
    runs = ["--runs", "default", "paper", "states_2", "guess_uniform", "lossless", "mine=--divergence hard"]
    STUDY["main"]([*words, *runs, *flags])
    results = {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}
    assert set(results) == {"target", "default-0", "paper-0", "states_2-0", "guess_uniform-0", "lossless-0", "mine-0"}  # and no weights
    for name, result in results.items():
        assert len(result["prompts"]) == 3
        for row in result["prompts"]:
            assert 0 < sum(row[f"tokens_{n}"] for n in (1, 2, 3, 4)) == row["tokens"] <= 12
            assert sum(row[f"forwards_{n}"] for n in (1, 2, 3, 4)) == row["forwards"]
        assert 1 <= result["figures"]["TPF"]["value"] <= 7 and result["figures"]["accuracy"]["value"] is not None
        assert str(folder.parent) not in json.dumps(result), name
    learned = [result["training"]["response_tokens"] for name, result in results.items() if name != "target"]
    assert len(set(learned)) == 1
    packed = {name: results[f"{name}-0"]["training"]["packed_tokens"] for name in ("paper", "default", "states_2")}
    assert packed["paper"] == packed["default"] < packed["states_2"]
    assert results["lossless-0"]["settings"]["lora_target_modules"] == ["down_proj", "o_proj"]  # defaults, which may change
    assert all(results["lossless-0"]["figures"][name] == results["target"]["figures"][name] for name in ("length", "repetition"))

    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    STUDY["main"]([*words, *runs, *flags])  # everything is already there
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    message = refused(capsys, STUDY["main"], *words, "--runs", "default", *flags, "--learning_rate", "1e-3")
    assert "default-0.json was made with other settings" in message
    old = json.loads((folder / "default-0.json").read_text())
    old["settings"]["ar_weight"] = 2.0  # made when this was the default
    (folder / "default-0.json").write_text(json.dumps(old))
    assert "default-0.json was made with other settings" in refused(capsys, STUDY["main"], *words, "--runs", "default", *flags)

    STUDY["main"](["--table", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    names = ["target", "default", "paper", "guess_uniform", "states_2", "lossless", "mine"]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in names]
    assert "<br>" in lines[4] and "<br>" not in lines[3]


def test_the_picture_joins_runs_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = {}
    monkeypatch.setattr(Axes, "plot", lambda axes, *points, label, **_: drawn.update({label: points}))
    made = {"target": [], "paper@1-0": [60, 1.1], "paper@1-1": [180, 1.3], "paper@4-0": [480, 1.5], "mine-0": [90, 2.0]}
    for run, (*seconds, tpf) in ((run, figures or [1.0]) for run, figures in made.items()):
        training = {"training": {"seconds": seconds[0]}} if seconds else {}
        result = {"run": run, "figures": {title: {"value": tpf} for title in STUDY["METRICS"]}, **training}
        (tmp_path / f"{run}.json").write_text(json.dumps(result))
    assert STUDY["picture"](tmp_path).startswith(b"\x89PNG")
    assert drawn == {"mine": ((1.5,), (2.0,)), "paper": ((2.0, 8.0), (pytest.approx(1.2), 1.5))}


def test_a_picture_needs_the_folder_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--table FOLDER" in refused(capsys, STUDY["main"], "--picture", str(tmp_path / "p.png"))
    assert "holds no results" in refused(capsys, STUDY["main"], "--table", str(tmp_path), "--picture", str(tmp_path / "p.png"))
    assert not list(tmp_path.iterdir())


def test_runs_for_several_epochs() -> None:
    assert STUDY["_named"]("default@3") == ("default@3", " --num_train_epochs 3")
    assert STUDY["_named"]("mine@2=--divergence hard") == ("mine@2", "--divergence hard --num_train_epochs 2")
    assert STUDY["_named"]("paper") == ("paper", STUDY["RUNS"]["paper"])


def test_an_unknown_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown run 'papers'; choose from default, paper" in refused(capsys, STUDY["main"], *words, "--runs", "papers")


def test_quarters_of_a_response() -> None:
    counts = STUDY["quarters"]([1, 1, 2, 4])
    assert [counts[f"tokens_{n}"] for n in (1, 2, 3, 4)] == [2, 2, 4, 0]
    assert [counts[f"forwards_{n}"] for n in (1, 2, 3, 4)] == [2, 1, 1, 0]


def test_differences_are_paired_by_prompt() -> None:
    base = [{"tokens": 10.0 * n, "forwards": 10.0 * n} for n in (1, 2, 3, 4)]
    runs = [{"tokens": 15.0 * n, "forwards": 10.0 * n} for n in (1, 2, 3, 4)]
    value, (low, high) = STUDY["difference"]([runs, runs], [base, base], "TPF")
    assert value == low == high == 0.5
