"""What a user can do wrong, for every command that it concerns: one line, exit status 2, nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import question_rows, refused, write_rows
from tiny import save_tiny_checkpoint, tiny_tokenizer
from torch import distributed
from transformers import MambaConfig, MambaForCausalLM
from transformers.utils import logging as transformers_logging

from cllm.cli import collect
from cllm.cli.command import command as command_decorator
from cllm.cli.main import COMMANDS
from cllm.cli.main import main as cllm
from cllm.errors import UsageError

Words = list[Any]
Build = Callable[..., Words]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "d.jsonl", question_rows(6))


@pytest.fixture(scope="module")
def trajectories(tiny_model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected") / "t"
    words = ["--model", tiny_model_dir, "--filename", data, "--max_new_tokens", 4, "--max_new_seq_len", 12]
    collect.main([*map(str, words), "--device", "cpu", "--output", str(folder)], task="gsm8k")
    return folder


@pytest.fixture
def words(tiny_model_dir: Path, data: Path, trajectories: Path, tmp_path: Path) -> Build:
    """Sound words of a command; changes replace an option's value, or leave the option out (None)."""
    out = tmp_path / "out"
    common = {"device": "cpu", "filename": data, "task": "gsm8k"}
    sound: dict[str, dict[str, Any]] = {
        "collect": {"model": tiny_model_dir, "output": out, "max_new_tokens": 4, "max_new_seq_len": 12} | common,
        "train": {"model": tiny_model_dir, "trajectories": trajectories, "output_dir": out, "max_steps": 1}
        | {"use_cpu": "true", "report_to": "none", "save_strategy": "no"},
        "speedup": {"test_model": tiny_model_dir, "output": out / "s.json", "max_new_seq_len": 8} | common,
        "acc": {"model_dir": tiny_model_dir, "output_file_name": out / "a.jsonl", "max_tokens": 8} | common,
        "chat": {"model": tiny_model_dir, "device": "cpu", "max_new_seq_len": 8},
    }

    def build(command: str, *flags: str, **changes: Any) -> Words:
        options = sound[command] | changes
        pairs = [(f"--{name}", value) for name, value in options.items() if value is not None]
        return [command, *(word for pair in pairs for word in pair), *flags]

    return build


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs words that must be refused; gives the error. Nothing may have been written then."""

    def run(given: Words) -> str:
        message = refused(capsys, cllm, *given)
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        return message

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # as a fresh process has it
    yield run
    transformers_logging.set_verbosity(verbosity)


MODEL_OPTION = {"collect": "model", "train": "model", "speedup": "test_model", "acc": "model_dir", "chat": "model"}
BLOCK_OPTION = {"collect": "max_new_tokens", "speedup": "max_new_tokens", "chat": "block_size"}
EVERY_COMMAND = pytest.mark.parametrize("command", MODEL_OPTION)
ON_DATA = pytest.mark.parametrize("command", ["collect", "speedup", "acc"])


# ---- the model ----


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file of the checkpoint; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def mamba(folder: Path) -> None:
    shutil.rmtree(folder)
    config = MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0)
    MambaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@EVERY_COMMAND
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "must be a checkpoint folder or a hub name"),
        (remove(*("config.json", "tokenizer.json", "tokenizer_config.json")), "cannot load"),
        (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer files"),
        (remove("model.safetensors"), "no file named model.safetensors"),
        (edit("tokenizer_config.json", eos_token=None), "has no end-of-sequence token"),
        (edit("config.json", num_hidden_layers=4), "do not fit its config.json"),
        (mamba, "the cache of mamba cannot be rolled back"),
    ],
    ids=["missing", "no_config", "no_tokenizer", "no_weights", "no_eos", "lacks_weights", "mamba"],
)
def test_models(words: Build, tiny_model_dir: Path, tmp_path: Path, refuse, command, change, message) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    change(model)
    assert message in refuse(words(command, **{MODEL_OPTION[command]: model}))


@EVERY_COMMAND
def test_no_pad_token_is_fine(words: Build, tiny_model_dir: Path, tmp_path: Path, monkeypatch, command) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    edit("tokenizer_config.json", pad_token=None)(model)
    monkeypatch.setattr("sys.stdin", Lines("1 + 1?\n"))
    cllm([str(word) for word in words(command, **{MODEL_OPTION[command]: model})])


class Lines:
    """Standard input that is no terminal."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def isatty(self) -> bool:
        return False


@EVERY_COMMAND
@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("attn_implementation", "flash_attention_2")])
def test_loading_options(words: Build, refuse, command, option, value) -> None:
    message = refuse(words(command, **{option: value}))
    assert value in message or "FlashAttention2" in message


# ---- block sizes and other numbers ----


@pytest.mark.parametrize("command", BLOCK_OPTION)
@pytest.mark.parametrize("size", ["0", "-1", "300", "x"])
def test_block_sizes(words: Build, refuse, command, size) -> None:
    more = {"max_new_seq_len": 400} if command == "collect" else {}
    assert f"{size}" in refuse(words(command, **{BLOCK_OPTION[command]: size} | more))


@pytest.mark.parametrize("size", ["0", "300"])
def test_block_sizes_of_acc(words: Build, refuse, size) -> None:
    given = words("acc", "--use_consistency_decoding", max_new_tokens_for_consistency=size)
    assert size in refuse(given)


@ON_DATA
@pytest.mark.parametrize("option", ["data_size", "batch_size"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "1.5", ""])
def test_counts(words: Build, refuse, command, option, value) -> None:
    message = refuse(words(command, **{option: value}))
    assert f"--{option}: must be an integer >= 1, got {value!r}" in message


@pytest.mark.parametrize(("command", "option"), [("collect", "max_new_seq_len"), ("chat", "max_new_seq_len"), ("acc", "max_tokens")])
def test_lengths(words: Build, refuse, command, option) -> None:
    assert "got " in refuse(words(command, **{option: "-1"}))


@pytest.mark.parametrize("command", ["collect", "speedup", "acc", "chat"])
def test_a_template_without_a_place(words: Build, refuse, command) -> None:
    message = refuse(words(command, prompt_template="no place"))
    assert "a text that contains {question}, got 'no place'" in message


# ---- the data ----


@ON_DATA
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("", "empty file"),
        ("no json\n[1]\n", "not valid JSON: 1, not a JSON object: 1"),
        ('{"text": "1+1?"}\n', "expected rows with question and answer, or question and target; found the fields text"),
        ('{"question": " ", "answer": "#### 1"}\n', "empty question: 1"),
        (b"\xff\xfe\xff", "not UTF-8"),
    ],
    ids=["missing", "empty", "malformed", "unknown_fields", "empty_question", "not_utf8"],
)
def test_data_without_a_usable_row(words: Build, tmp_path: Path, refuse, command, content, message) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    got = refuse(words(command, filename=path))
    assert message in got and "bad.jsonl" in got


@ON_DATA
def test_a_folder_for_a_file(words: Build, tmp_path: Path, refuse, command) -> None:
    assert "expected a file, got a folder" in refuse(words(command, filename=tmp_path))


@ON_DATA
def test_bad_rows_are_named_and_counted(words: Build, data: Path, tmp_path: Path, capsys, caplog, command) -> None:
    lines = data.read_text().splitlines()
    lines[1:1] = ["no json"]
    lines[4:4] = ['{"question": "", "answer": "#### 1"}', json.dumps({"question": "x" * 400, "answer": "#### 1"})]
    path = write_rows(tmp_path / "mixed.jsonl", lines)
    cllm([str(word) for word in words(command, filename=path)])
    assert "skipped line 2: not valid JSON" in caplog.text and "skipped line 5: empty question" in caplog.text
    printed = capsys.readouterr().out
    for counted in ("not valid JSON", "empty question"):
        assert counted in printed
    assert {
        "collect": "1 left out: prompt longer than the context",
        "speedup": "left out: 1 prompts that fill the context",
        "acc": "1 prompts fill the model's context and count as wrong: gsm8k-test-6",
    }[command] in printed


def test_every_prompt_too_long(words: Build, tmp_path: Path, capsys, refuse) -> None:
    path = write_rows(tmp_path / "long.jsonl", [{"question": "x" * 400, "answer": "#### 1"}])
    with pytest.raises(SystemExit) as exit_:
        cllm([str(word) for word in words("collect", filename=path, output=tmp_path / "long")])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and "1 left out: prompt longer than the context" in captured.out
    assert "no response was kept" in captured.err
    assert "all 1 prompts fill" in refuse(words("speedup", filename=path))


# ---- trajectories ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot read"),
        (lambda path: path.mkdir(), "run cllm collect first"),
        (lambda path: path.write_text(""), "empty file"),
        (lambda path: path.write_text("[]"), "holds no trajectories"),
        (lambda path: path.write_text('[{"data_id": "d"}]'), "item 1: lacks jacobian_itr_id"),
        (lambda path: path.write_text("[{"), "bad"),
    ],
    ids=["missing", "empty_folder", "empty_file", "empty_list", "other_fields", "torn"],
)
def test_trajectories(words: Build, tmp_path: Path, refuse, make, message) -> None:
    path = tmp_path / "bad"
    make(path)
    got = refuse(words("train", trajectories=path))
    assert message in got and "bad" in got


def test_a_torn_shard(words: Build, trajectories: Path, tmp_path: Path, refuse) -> None:
    shutil.copytree(trajectories, tmp_path / "t")
    next((tmp_path / "t").glob("part-*")).write_bytes(b"PAR1")
    assert "resuming collects its rows again" in refuse(words("train", trajectories=tmp_path / "t"))


@pytest.mark.parametrize("size", ["0", "5", "300", "x"])
def test_trajectories_of_another_block_size(words: Build, refuse, size) -> None:
    assert size in refuse(words("train", block_size=size))


def test_trajectories_of_another_vocabulary(words: Build, tmp_path: Path, refuse) -> None:
    model = save_tiny_checkpoint(tmp_path / "model", vocab_size=120)
    message = refuse(words("train", model=model))
    assert "a vocabulary of 99 tokens, the model has 120" in message


def test_labels_that_are_not_there(words: Build, refuse) -> None:
    for option in ({"use_gt_labels": "true"}, {"ar_loss": "labels"}):
        assert "collect the trajectories with --use_labels" in refuse(words("train", **option))


def test_resuming_with_other_settings(words: Build, trajectories: Path, refuse) -> None:
    before = sorted(trajectories.iterdir())
    given = words("collect", "--use_aug", output=trajectories, max_new_tokens=5)
    message = refuse(given)
    assert "block_size: 4 there, 5 now" in message and "use_aug: false there, true now" in message
    assert sorted(trajectories.iterdir()) == before


def test_resuming_with_another_file(words: Build, trajectories: Path, tmp_path: Path, refuse) -> None:
    other = write_rows(tmp_path / "other.jsonl", question_rows(2))
    message = refuse(words("collect", output=trajectories, filename=other))
    assert 'source: "d.jsonl" there, "other.jsonl" now' in message


# ---- words ----


def test_unknown_command(refuse) -> None:
    assert refuse(["zork"]) == f"unknown command 'zork'; choose from {', '.join(COMMANDS)}"


@ON_DATA
def test_unknown_task(words: Build, refuse, command) -> None:
    assert "unknown task 'zork'; choose from code_search_net" in refuse(words(command, task="zork"))


def test_unknown_cllm_type(words: Build, refuse) -> None:
    message = refuse(words("chat", cllm_type="zork"))
    assert "invalid choice: 'zork' (choose from" in message and "gsm8k" in message


@EVERY_COMMAND
def test_unknown_option(words: Build, refuse, command) -> None:
    assert "unrecognized arguments: --zork 3" in refuse(words(command, zork=3))


@EVERY_COMMAND
def test_a_required_option_is_missing(words: Build, refuse, command) -> None:
    message = refuse(words(command, **{MODEL_OPTION[command]: None}))
    assert f"required: --{MODEL_OPTION[command]}" in message and f"`cllm {command} --help`" in message


@EVERY_COMMAND
def test_help(capsys, command) -> None:
    with pytest.raises(SystemExit) as exit_:
        cllm([command, "--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and f"cllm {command}" in printed and f"--{MODEL_OPTION[command]}" in printed


@pytest.mark.parametrize(
    "option",
    [
        {"learning_rate": "nan"},
        {"learning_rate": "-1"},
        {"ar_weight": "nan"},
        {"ar_weight": "-1"},
        {"distance_decay": "0"},
        {"states_per_block": "0"},
        {"num_train_epochs": "-1"},
        {"per_device_train_batch_size": "0"},
        {"gradient_accumulation_steps": "0"},
        {"seed": "-1"},
        {"consistency": "zork"},
        {"teacher": "zork"},
        {"ar_loss": "zork"},
        {"lr_scheduler_type": "zork"},
        {"report_to": "zork"},
        {"eval_strategy": "steps"},
        {"resume_from_checkpoint": "zork"},
    ],
    ids=lambda option: "=".join(*option.items()),
)
def test_training_options(words: Build, refuse, option) -> None:
    (value,) = option.values()
    message = refuse(words("train", **option))
    assert value in message.lower()


def test_places_that_cannot_be_written(words: Build, data: Path, refuse) -> None:
    for given in (
        words("collect", output=data / "x"),
        words("collect", published=data.parent),
        words("train", output_dir=data),
        words("speedup", output=data / "x.json"),
        words("acc", output_file_name=data / "x.jsonl"),
    ):
        assert "cannot write" in refuse(given)


# ---- a full disk ----


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_full_disk(words: Build, small_disk: Path, tmp_path: Path, capsys) -> None:
    from cllm.trajectory.store import stored_counts

    data = write_rows(tmp_path / "many.jsonl", question_rows(90))
    folder = small_disk / "t"
    given = words("collect", output=folder, filename=data, batch_size=4, max_new_seq_len=32)
    with pytest.raises(SystemExit) as exit_:
        cllm([str(word) for word in given])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and error.startswith("error: cannot write") and "No space left" in error
    assert stored_counts(folder)["kept"] > 0 and not list(folder.glob(".*"))


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_full_disk_in_training(words: Build, small_disk: Path, capsys) -> None:
    """The disk holds less than the tiny model's weights."""
    for strategy in ("no", "steps"):
        given = words("train", output_dir=small_disk / strategy, save_strategy=strategy, save_steps=1)
        with pytest.raises(SystemExit) as exit_:
            cllm([str(word) for word in given])
        error = capsys.readouterr().err.splitlines()[-1]
        assert exit_.value.code == 2 and error.endswith("no space left on the disk")


# ---- whatever happens inside ----


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UsageError("got 0"), 2, "error: got 0"),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), 2, "error: No space left on device: a.bin"),
        (torch.OutOfMemoryError("2 GiB"), 2, "error: out of memory; try a smaller batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory; try a smaller batch size"),
        (MemoryError(), 2, "error: out of memory; try a smaller batch size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(capsys, raised, code, said) -> None:
    with pytest.raises(SystemExit) as exit_:
        raising(raised)()
    assert (exit_.value.code, capsys.readouterr().err) == (code, said + "\n")


@pytest.mark.parametrize("raised", [RuntimeError("a defect"), FileNotFoundError(errno.ENOENT, "x"), KeyError("x")])
def test_defects_keep_their_traceback(raised) -> None:
    with pytest.raises(type(raised)):
        raising(raised)()


def test_a_command_leaves_its_process_group(tmp_path: Path) -> None:
    """A process that ends while threads of Gloo still hold tensors sometimes aborts."""

    @command_decorator
    def main() -> None:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    main()
    assert not distributed.is_initialized()


def raising(error: BaseException) -> Callable[[], None]:
    @command_decorator
    def main() -> None:
        raise error

    return main


# ---- real processes ----


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from cllm.cli.main import main; from contextlib import suppress\n"
        "for words in (['--help'], ['collect', '--help'], ['acc', '--help'], ['chat', '--help'], ['tasks']):\n"
        "    with suppress(SystemExit): main(words)\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.slow
def test_real_processes_say_one_line(words: Build, tmp_path: Path) -> None:
    for given in (words("collect", filename=tmp_path / "nope"), words("train", trajectories=tmp_path / "nope")):
        done = python("-m", "cllm", *map(str, given))
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == f"error: cannot read {tmp_path / 'nope'}: No such file or directory\n"
