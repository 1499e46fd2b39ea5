"""The chat command: piped, and at a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import EOS_ID, VOCABULARY, save_tiny_checkpoint, tiny_tokenizer

from cllm.cli import chat
from cllm.decoding import JacobiDecoder
from cllm.models import load_model
from cllm.tasks import get_task
from cllm.tasks.source import load_examples

SCRIPT = Path(__file__).parents[2] / "scripts" / "chat.sh"
SEED = 6  # of a tiny model that goes on and on, with spaces in between
STATISTICS = re.compile(r"\d+ tokens, \d+ forwards, \d+\.\d\d tokens per forward, \d+\.\d tokens/s, .* stopped by \w+")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"), seed=SEED)


@pytest.fixture
def talk(model_dir: Path, monkeypatch, capsys) -> Callable[..., tuple[list[str], str]]:
    """Pipes lines into the command; gives the lines of its output, and what it says of errors."""

    def run(*lines: str | bytes, options: tuple[str, ...] = (), model: Path = model_dir) -> tuple[list[str], str]:
        piped = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        chat.main(["--model", str(model), "--device", "cpu", "--max_new_seq_len", "20", *options])
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    return run


def expected(model_dir: Path, conversation: str, tokens: int = 20) -> str:
    """What the model answers to a text, as a chat prints it."""
    tokenizer = tiny_tokenizer()
    (result,) = JacobiDecoder(load_model(str(model_dir), device="cpu"), 1, eos_token_ids=[2]).generate(
        [tokenizer(conversation).input_ids], max_new_tokens=tokens
    )
    return tokenizer.decode(result.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("options", [(), ("--guess", "pool+prompt_lookup")], ids=len)
def test_piped(talk, model_dir: Path, options: tuple[str, ...]) -> None:
    lines, errors = talk("hello", options=options)
    assert lines == expected(model_dir, "[user]hello\n[assistant]").splitlines() and not errors


def test_turns_build_on_each_other(talk, model_dir: Path) -> None:
    first = expected(model_dir, "[user]hi\n[assistant]")
    second = expected(model_dir, f"[user]hi\n[assistant]{first.strip()}\n[user]and?\n[assistant]")
    assert talk("hi", "and?")[0] == [*first.splitlines(), *second.splitlines()]
    assert talk("hi", "/reset", "and?")[0] == [
        *first.splitlines(),
        *expected(model_dir, "[user]and?\n[assistant]").splitlines(),
    ]


def test_exit_leaves_the_rest_unread(talk) -> None:
    assert talk("/exit", "hi") == ([], "")


def test_empty_lines_are_passed_over(talk) -> None:
    assert talk("", "  ") == ([], "")


def test_statistics(talk) -> None:
    lines, _ = talk("/stats", "hi", "/stats")
    assert lines[0] == "nothing has been answered yet" and STATISTICS.fullmatch(lines[-1])
    assert lines[-1].startswith("20 tokens, ") and lines[-1].endswith("stopped by length")
    lines, _ = talk("hi", "/stats", options=("--stats",))
    assert lines[-2] == f"[{lines[-1]}]"


def test_the_papers_types_choose_the_template(talk, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path, seed=SEED, chat_template=False)
    for name, task in {"python": "code_search_net", "spider": "spider", "gsm8k": "gsm8k", "sharegpt": "sharegpt"}.items():
        prompt = get_task(task).plain_template.replace("{question}", "hi")
        assert talk("hi", options=("--cllm_type", name), model=model)[0] == expected(model, prompt).splitlines()


def test_ar_writes_the_last_answer_again_and_compares(talk, model_dir: Path) -> None:
    answer = expected(model_dir, "[user]hi\n[assistant]").splitlines()
    lines, _ = talk("hi", "/ar", "/ar", "/reset", "hi")
    assert lines[: len(answer)] == answer == lines[-len(answer) :]
    for start, name in ((len(answer), "AR"), (2 * len(answer) + 3, "Jacobi")):
        assert lines[start].startswith(f"{name} decoding from now on")
        assert lines[start + 1 : start + 1 + len(answer)] == answer
        assert lines[start + len(answer) + 2].startswith("[the same text; ")
    assert "20 forwards, 1.00 tokens per forward" in lines[2 * len(answer) + 1]


def test_ar_draws_the_same_tokens(talk) -> None:
    lines, _ = talk("hi", "and?", "/ar", options=("--temperature", "1.3", "--seed", "1"))
    assert lines[-1].startswith("[the same text; ")


def test_ar_before_the_first_answer_only_switches(talk, model_dir: Path) -> None:
    lines, _ = talk("/ar", "hi", "/stats")
    answer = expected(model_dir, "[user]hi\n[assistant]").splitlines()
    assert lines[:-1] == ["AR decoding from now on", *answer] and "20 forwards" in lines[-1]


def test_a_saved_conversation_is_data_of_sharegpt(talk, model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    lines, errors = talk("hi", f"/save {path}", "/save", f"/save {tmp_path}")
    assert lines[-2:] == [f"2 messages saved in {path}", "say where: /save FILE"]
    assert errors.startswith(f"error: cannot write {tmp_path}: ") and len(errors.splitlines()) == 1
    (example,) = load_examples(get_task("sharegpt"), path, "test")
    assert [m["content"] for m in example.messages] == ["hi"]
    assert example.reference == expected(model_dir, "[user]hi\n[assistant]").strip()


def test_several_lines_are_one_turn(talk, model_dir: Path) -> None:
    answer = expected(model_dir, "[user]a\nb\n[assistant]").splitlines()
    assert talk("a\\", "b")[0] == talk('"""a', 'b"""')[0] == talk('"""', "a", "b")[0] == answer


def test_help_names_every_command(talk) -> None:
    lines, _ = talk("/help")
    assert [line.split()[0] for line in lines] == [name.split()[0] for name in chat.COMMANDS]


def test_an_unknown_slash_command(talk) -> None:
    lines, _ = talk("/zork")
    assert lines == [f"unknown command /zork; {chat.HELP}"]


def test_bytes_that_are_no_text(talk, model_dir: Path) -> None:
    assert talk(b"h\xff")[0] == expected(model_dir, "[user]h\ufffd\n[assistant]").splitlines()


def test_the_block_size_changes_nothing_but_speed(talk) -> None:
    assert talk("hi", options=("--block_size", "1"))[0] == talk("hi", options=("--block_size", "7"))[0]


def test_a_measured_guess_changes_nothing_but_speed(talk) -> None:
    assert talk("hi", options=("--guess", "auto"))[0] == talk("hi")[0]


def test_draws_can_be_repeated(talk) -> None:
    options = ("--temperature", "1.2", "--top_k", "60", "--top_p", "0.99", "--min_p", "0.001", "--repetition_penalty", "1.1")
    first, _ = talk("hi", "/reset", "hi", options=(*options, "--seed", "3"))
    assert talk("hi", "/reset", "hi", options=(*options, "--seed", "3", "--block_size", "1"))[0] == first
    once, _ = talk("hi", options=(*options, "--seed", "3"))
    assert first[: len(once)] == once and first != once * 2  # asked again, it answers anew
    assert talk("hi", options=(*options, "--seed", "4"))[0] != once
    assert len({tuple(talk("hi", options=options)[0]) for _ in range(3)}) > 1  # without a seed, every talk is another


@pytest.mark.parametrize("seed", [-(1 << 63), (1 << 63) - 1])
def test_the_first_and_the_last_seed_serve_a_whole_talk(talk, seed: int) -> None:
    talk("hi", "and?", "and?", options=("--temperature", "1", "--top_p", "0.9", "--seed", str(seed)))


def test_bad_sampling_options(talk, capsys) -> None:
    for words, message in (
        (("--temperature", "-1"), "temperature must be 0 (greedy) or between 1e-05 and 100000, got -1.0"),
        (("--temperature", "1", "--top_k", "-2"), "top_k must be between 0 (off) and 2147483647, got -2"),
        (("--min_p", "2"), "min_p must be between 0 and 1, got 2.0"),
        (("--repetition_penalty", "0"), "repetition_penalty must be between 1e-05 and 100000, got 0.0"),
        (("--seed", str(1 << 63)), "seed must be between -2**63 and 2**63 - 1, got 9223372036854775808"),
    ):
        with pytest.raises(SystemExit) as exit_:
            talk("hi", options=words)
        assert exit_.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


def test_the_context_is_full_in_mid_conversation(talk, model_dir: Path) -> None:
    lines, errors = talk("hi", "x" * 250, "/reset", "hi")
    answer = expected(model_dir, "[user]hi\n[assistant]").splitlines()
    assert lines == answer * 2  # the conversation that did not fit is given up, the next one goes on
    assert "leaves no room in the model's context of 256; /reset starts a new conversation" in errors
    assert errors.startswith("error: ") and len(errors.splitlines()) == 1


def test_an_answer_stops_where_the_context_ends(talk) -> None:
    lines, errors = talk("x" * 230, "/stats")
    assert lines[-1].endswith("stopped by context") and not errors


def test_a_first_question_that_does_not_fit(talk, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        talk("x" * 250)
    assert exit_.value.code == 2 and "leaves no room in the model's context" in capsys.readouterr().err


def test_a_model_without_a_chat_template(talk, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path, seed=SEED, chat_template=False)
    plain = "Question:\nhi\nAnswer:\nLet's think step by step.\n"
    assert talk("hi", model=model)[0] == expected(model, plain).splitlines()


# ---- at a terminal ----


SPACE_ID = VOCABULARY.index(" ")


class Terminal:
    """The command at a pseudo-terminal."""

    def __init__(self, *words: str, kind: str = "dumb") -> None:
        self.seen = ""
        self.pid, self.handle = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore it
            os.environ.update(OMP_NUM_THREADS="1", TERM=kind)
            os.execv(sys.executable, [sys.executable, "-m", "cllm", "chat", "--device", "cpu", *words])

    def send(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def expect(self, text: str, seconds: float = 90) -> str:
        """Wait until ``text`` is there; gives and forgets what came up to its end."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end and select.select([self.handle], [], [], 1 + end - time.monotonic())[0], (
                f"no {text!r} in {self.seen!r}"
            )
            try:
                piece = os.read(self.handle, 1 << 16)
            except OSError:  # what Linux says when the other side is closed
                piece = b""
            assert piece, f"no {text!r} in {self.seen!r}"
            self.seen += piece.decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def end(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.end()
        os.close(self.handle)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A chat with a model whose answers take minutes: it never ends one."""
    path = save_tiny_checkpoint(tmp_path, seed=SEED, max_position_embeddings=100_000)
    model = load_model(str(path), device="cpu")
    with torch.no_grad():  # of a row and its opposite one gives a logit above that of a zero row
        weight = model.get_output_embeddings().weight
        weight[EOS_ID] = 0.0
        weight[SPACE_ID] = -weight[SPACE_ID - 1]
    model.save_pretrained(path)
    started = Terminal("--model", str(path), "--max_new_seq_len", "90000", "--block_size", "2")
    yield started
    started.close()


@pytest.mark.slow
def test_control_c_stops_the_answer_not_the_program(terminal: Terminal) -> None:
    greeting = terminal.expect("> ")
    assert chat.HELP in greeting and "An empty line asks: A bakery" in greeting
    for question in ("hello", ""):  # the second is the default question
        terminal.send(question + "\n")
        terminal.expect(question + "\r\n")
        terminal.expect(" ")  # the answer has begun
        terminal.send("\x03")
        terminal.expect("(stopped)")
        terminal.expect("> ")
    terminal.send("/stats\n")
    terminal.expect("nothing has been answered yet")
    terminal.expect("> ")  # what is typed before may get lost
    terminal.send("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
def test_control_c_at_the_prompt_leaves(terminal: Terminal) -> None:
    terminal.expect("> ")
    for _ in range(9):  # readline sees a signal between its prompt and its wait for a key only at the next key
        terminal.send("\x03")
        with suppress(AssertionError):
            terminal.expect("interrupted", 10)
            break
    else:
        pytest.fail("Ctrl-C did not leave")
    assert terminal.end() == 130


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dumb", "xterm"])  # plain text, and Markdown drawn by rich
def test_a_talk_at_a_terminal(model_dir: Path, tmp_path: Path, kind: str) -> None:
    if kind == "xterm":
        pytest.importorskip("rich")
    terminal = Terminal("--model", str(model_dir), "--max_new_seq_len", "20", kind=kind)
    try:
        terminal.expect("> ")
        terminal.send("a\\\n")
        terminal.expect(". ")
        terminal.send("b\n")
        terminal.expect("> ")
        terminal.send("/ar\n")
        terminal.expect("AR decoding from now on")
        assert "[the same text; " in terminal.expect("> ")
        terminal.send(f"/save {tmp_path}/talk.json\n")
        terminal.expect("2 messages saved in")
        terminal.expect("> ")
        terminal.send("\x1b[A\x1b[A\n")  # two lines up in the history
        terminal.expect("Jacobi decoding from now on")
        terminal.expect("> ")
        terminal.send("\x04")
        assert terminal.end() == 0
    finally:
        terminal.close()
    question, answer = json.loads((tmp_path / "talk.json").read_text())[0]["messages"]
    assert question["content"] == "a\nb"
    assert answer["content"] == expected(model_dir, "[user]a\nb\n[assistant]").strip()


@pytest.mark.slow
def test_the_papers_ways_to_start(model_dir: Path) -> None:
    options = ["--max_new_seq_len", "20", "--device", "cpu"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in (
        [sys.executable, "-m", "cllm.inference.cli", "--model", str(model_dir), "--stats", *options],
        ["bash", str(SCRIPT), str(model_dir), "gsm8k", *options],
        ["bash", str(SCRIPT), str(model_dir), *options],
    ):
        done = subprocess.run(command, input="hello\n", capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert done.stdout.startswith(expected(model_dir, "[user]hello\n[assistant]"))
        assert STATISTICS.search(done.stdout)
