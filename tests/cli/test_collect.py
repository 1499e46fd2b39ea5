"""The collect command on a tiny model."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import question_rows, refused, write_rows
from tiny import save_tiny_checkpoint

from cllm.cli import collect
from cllm.cli.main import main as cllm
from cllm.trajectory.record import TrajectoryRow
from cllm.trajectory.store import TrajectoryDataset, TrajectoryWriter, read_rows

SCRIPT = Path(__file__).parents[2] / "data" / "generate_trajectory_gsm8k.py"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose responses are all worth keeping."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", seed=3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "d.jsonl", question_rows(8))


def run(model_dir: Path, data: Path, output: Path, *more: str) -> dict[str, TrajectoryRow]:
    words = ["--model", model_dir, "--filename", data, "--output", output, "--device", "cpu", "--max_new_tokens", 4]
    collect.main([*map(str, words), "--max_new_seq_len", "12", "--batch_size", "3", *more], task="gsm8k")
    return {row.row_id: row for row in read_rows(output)}


def settings(folder: Path) -> dict[str, object]:
    return json.loads((folder / "settings.json").read_text())


def test_what_is_stored(model_dir: Path, data: Path, tmp_path: Path, capsys) -> None:
    rows = run(model_dir, data, tmp_path / "t", "--use_aug", "--use_labels")
    assert sorted(rows) == [f"gsm8k-train-{n}" for n in range(1, 9)]
    assert all(row.label_ids and row.augmented for row in rows.values())
    assert "8 responses stored in" in capsys.readouterr().out
    stored = settings(tmp_path / "t")
    expected = {"block_size": 4, "prompt_template": "chat", "task": "gsm8k", "source": "d.jsonl", "vocab_size": 99}
    assert stored.items() >= expected.items() and stored["model"] == str(model_dir)


def test_templates_are_stored(model_dir: Path, data: Path, tmp_path: Path) -> None:
    run(model_dir, data, tmp_path / "t", "--prompt_template", "Q: {question}\\nA:", "--data_size", "1")
    assert settings(tmp_path / "t")["prompt_template"] == "Q: {question}\nA:"


def test_a_target_without_a_chat_template(data: Path, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "m", chat_template=False)
    run(model, data, tmp_path / "t", "--data_size", "1")
    assert settings(tmp_path / "t")["prompt_template"] == "Question:\n{question}\nAnswer:\nLet's think step by step.\n"


def test_data_size_gzip_and_batch_size(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Neither how the file is packed nor how prompts are batched changes a row."""
    whole = run(model_dir, data, tmp_path / "t")
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    few = run(model_dir, packed, tmp_path / "few", "--data_size", "5", "--batch_size", "1")
    assert few == {key: whole[key] for key in sorted(whole)[:5]}


def test_resumed_equals_uninterrupted(model_dir: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    whole = run(model_dir, data, tmp_path / "whole")
    stored = 0
    write = TrajectoryWriter.write

    def stop_at_the_second(self, *batch):
        nonlocal stored
        if stored == 1:
            raise KeyboardInterrupt
        stored += 1
        write(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(TrajectoryWriter, "write", stop_at_the_second)
        run(model_dir, data, tmp_path / "t")
    assert exit_.value.code == 130
    assert len(list(read_rows(tmp_path / "t"))) == 3
    assert run(model_dir, data, tmp_path / "t") == whole


def test_nothing_left_to_do(model_dir: Path, data: Path, tmp_path: Path, capsys) -> None:
    first = run(model_dir, data, tmp_path / "t")
    capsys.readouterr()
    assert run(model_dir, data, tmp_path / "t") == first
    captured = capsys.readouterr()
    assert "(8 examples there already)" in captured.err and "8 responses stored" in captured.out


def test_no_resume_starts_anew(model_dir: Path, data: Path, tmp_path: Path) -> None:
    run(model_dir, data, tmp_path / "t")
    rows = run(model_dir, data, tmp_path / "t", "--no-resume", "--seed", "1", "--data_size", "2")
    assert sorted(rows) == ["gsm8k-train-1", "gsm8k-train-2"] and settings(tmp_path / "t")["seed"] == 1


def test_a_seed_changes_states_not_responses(model_dir: Path, data: Path, tmp_path: Path) -> None:
    first, other = run(model_dir, data, tmp_path / "a"), run(model_dir, data, tmp_path / "b", "--seed", "1")
    assert first != other
    assert all(first[key].response_ids == other[key].response_ids for key in first)


def test_left_out_and_skipped(model_dir: Path, tmp_path: Path, capsys, caplog) -> None:
    rows = question_rows(3)
    long = {"question": "x" * 300, "answer": "#### 1"}
    blank, unmarked = {"question": " ", "answer": "#### 1"}, {"question": "a?", "answer": "1"}
    data = write_rows(tmp_path / "d.jsonl", [*rows, rows[0], "{torn", long, blank, unmarked, [1]])
    assert len(run(model_dir, data, tmp_path / "t")) == 3
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == [
        "  1 left out: duplicate prompt",
        "  1 left out: prompt longer than the context",
        "  1 rows skipped: answer without '####'",
        "  1 rows skipped: empty question",
        "  1 rows skipped: not a JSON object",
        "  1 rows skipped: not valid JSON",
    ]
    assert "skipped line 5: not valid JSON" in caplog.text


def test_the_published_form(model_dir: Path, data: Path, tmp_path: Path) -> None:
    rows = run(model_dir, data, tmp_path / "t", "--use_aug", "--use_labels", "--published", str(tmp_path / "p.json"))
    assert all(row.block_starts == list(range(0, len(row.response_ids), 4)) for row in rows.values())
    again = list(TrajectoryDataset(tmp_path / "p.json", eos_ids=[2]))
    assert len(again) == len(rows)
    of_prompt = {tuple(row.prompt_ids): row for row in rows.values()}
    for row in again:
        assert vars(row) | {"row_id": ""} == vars(of_prompt[tuple(row.prompt_ids)]) | {"row_id": ""}


@pytest.mark.parametrize(
    ("run_in", "scripts_in", "expected"),
    [("a", "a/data", "a/data"), ("a/data", "a/data", "a/data"), ("b", "a/data", "b"), ("b", "b/data/other", "b")],
)
def test_the_default_folder(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch, capsys, run_in: str, scripts_in: str, expected: str
) -> None:
    """Where the command is run, whatever checkout is installed, under a name made of the settings; and it says so."""
    for folder in (run_in, scripts_in):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / scripts_in / SCRIPT.name).touch()
    monkeypatch.chdir(tmp_path / run_in)
    words = ["--model", str(model_dir), "--filename", str(data), "--max_new_tokens", "4", "--max_new_seq_len", "8"]
    collect.main([*words, "--use_aug", "--device", "cpu", "--data_size", "1"], task="gsm8k")
    folder = tmp_path / expected / "collected_jacobi_trajectory" / "gsm8k_m_n4_len8_aug"
    assert (folder / "settings.json").is_file()
    printed = capsys.readouterr()
    assert f"collecting into {folder} (" in printed.err and f"stored in {folder}\n" in printed.out


def refusal(capsys, model: Path, data: Path, folder: Path) -> str:
    words = ["--task=gsm8k", f"--model={model}", f"--filename={data}", f"--output={folder}", "--device=cpu"]
    return refused(capsys, collect.main, *words, "--max_new_tokens=4", "--max_new_seq_len=12")


def test_other_weights_in_the_same_folder_are_refused(data: Path, tmp_path: Path, capsys) -> None:
    model = save_tiny_checkpoint(tmp_path / "m", seed=3)
    before = run(model, data, tmp_path / "t")
    save_tiny_checkpoint(tmp_path / "m", seed=4)
    message = refusal(capsys, model, data, tmp_path / "t")
    assert 'which has other settings: weights: "' in message and message.count(" there, ") == 1
    assert {row.row_id: row for row in read_rows(tmp_path / "t")} == before


@pytest.mark.parametrize("change", ["other", "longer", "shorter", "an answer"])
def test_another_file_of_the_same_name_is_refused(model_dir: Path, data: Path, tmp_path: Path, capsys, change: str) -> None:
    run(model_dir, data, tmp_path / "t")
    rows = question_rows(8)
    rows[7] = rows[7] | {"answer": "#### 1"} if change == "an answer" else rows[7]
    write_rows(data, {"other": rows[::-1], "longer": question_rows(9), "shorter": rows[:7], "an answer": rows}[change])
    message = refusal(capsys, model_dir, data, tmp_path / "t")
    assert 'which has other settings: source_rows: "' in message and message.count(" there, ") == 1


def test_the_same_rows_are_the_same_source(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Moved, written anew, or as a list: their row ids and prompts are what they were."""
    first = run(model_dir, data, tmp_path / "t", "--data_size", "3")
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / data.name
    moved.write_text(json.dumps(question_rows(8)))
    assert len(first) == 3 and len(run(model_dir, moved, tmp_path / "t")) == 8


def test_a_folder_of_before_these_settings_goes_on(model_dir: Path, data: Path, tmp_path: Path) -> None:
    run(model_dir, data, tmp_path / "t", "--data_size", "3")
    later = {"weights", "source_rows"}
    earlier = {name: value for name, value in settings(tmp_path / "t").items() if name not in later}
    (tmp_path / "t" / "settings.json").write_text(json.dumps(earlier))
    assert len(run(model_dir, data, tmp_path / "t")) == 8 and later < settings(tmp_path / "t").keys()


def test_one_run_at_a_time(model_dir: Path, data: Path, tmp_path: Path, capsys) -> None:
    run(model_dir, data, tmp_path / "t")
    with TrajectoryWriter(tmp_path / "t", settings(tmp_path / "t"), resume=True):
        assert "another process is writing into" in refusal(capsys, model_dir, data, tmp_path / "t")


def test_the_task_as_an_option(model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = ["collect", "--task", "gsm8k", "--model", str(model_dir), "--filename", str(data), "--device", "cpu"]
    cllm([*words, "--output", str(tmp_path / "t"), "--max_new_seq_len", "16", "--data_size", "1"])
    assert settings(tmp_path / "t")["task"] == "gsm8k"


@pytest.mark.slow
def test_the_papers_command(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Word for word but for the lengths, as a real process that says little."""
    words = f"--model {model_dir} --filename {data} --use_aug --use_labels --max_new_tokens 16 --max_new_seq_len 24"
    done = subprocess.run([sys.executable, str(SCRIPT), *words.split(), "--output", str(tmp_path / "t")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"8 responses stored in {tmp_path / 't'}\n"
    bar, *others = reversed(done.stderr.strip().splitlines())
    assert "8/8" in bar
    assert all(line.startswith("collecting into") or "example" in line or not line for line in others)


def test_responses_only(model_dir: Path, data: Path, tmp_path: Path, capsys) -> None:
    """The same responses in the same blocks, each trajectory cut down to its fixed point."""
    whole, bare = run(model_dir, data, tmp_path / "t"), run(model_dir, data, tmp_path / "r", "--responses_only")
    assert settings(tmp_path / "r") == settings(tmp_path / "t") | {"responses_only": True}
    for name, row in whole.items():
        assert bare[name] == replace(row, trajectories=[states[-1:] for states in row.trajectories])
    for more, word in ((["--use_aug"], "use_aug"), (["--published", str(tmp_path / "p.json")], "--published")):
        with pytest.raises(SystemExit):
            run(model_dir, data, tmp_path / "x", "--responses_only", *more)
        assert word in capsys.readouterr().err
