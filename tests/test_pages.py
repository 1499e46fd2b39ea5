"""README and pages: commands and snippets run in a reduced form, quoted code is the code, and links resolve.

Commands run unchanged, with :data:`REDUCED` appended, in a folder that holds the files that the pages mention.
"""

import io
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import question_rows, succeeds, write_rows
from mask_picture import picture
from pages import NOT_RUN, PAGES, ROOT, Block, blocks, is_quote, name, runs
from rows import HUMAN_EVAL
from sql_questions import main as write_sql_questions
from tiny import save_tiny_adapter, save_tiny_checkpoint

from cllm.cli.main import COMMANDS
from cllm.cli.main import main as cllm_main

ADDRESS = "http://127.0.0.1:8000"
TRAINING = "--max_steps 1 --per_device_train_batch_size 2 --use_cpu --report_to none --save_strategy no --disable_tqdm true"
REDUCED = {
    "collect": "--data_size 6 --max_new_seq_len 20 --device cpu",
    "sft": TRAINING,
    "train": TRAINING,
    "make": "--max_new_seq_len 16 --device cpu",
    "speedup": "--data_size 2 --max_new_seq_len 6 --device cpu",
    "acc": "--data_size 2 --max_tokens 6 --device cpu",
    "tune": "--data_size 2 --max_new_seq_len 6 --widths 4 --drafts 3 --guess context --device cpu",
    "generate": "--max_tokens 6 --device cpu",
    "chat": "--max_new_seq_len 6 --device cpu",
    "serve": "--port 0 --device cpu",
    "demo": "--port 0 --device cpu --no-browser --record_tokens 6",
}
OUTPUTS = ("--output_dir", "--output")  # folders that a command writes
pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------ a folder with the files that pages mention


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, data of every task, trajectories, and the project's scripts."""
    folder = tmp_path_factory.mktemp("pages")
    model = save_tiny_checkpoint(folder / "my-model", seed=3, max_position_embeddings=2048)
    save_tiny_adapter(folder / "my-cllm", model)
    rows = question_rows(12)
    write_rows(folder / "gsm8k_train.jsonl", rows[:8])
    write_rows(folder / "gsm8k_test.jsonl", [row | {"source": "gsm8k"} for row in rows[8:]])
    write_rows(folder / "prompts.jsonl", [{"prompt": row["question"]} for row in rows])
    write_rows(folder / "question.jsonl", [{"question_id": n, "category": "math", "turns": ["1?", "2?"]} for n in (1, 2)])
    write_rows(folder / "HumanEval.jsonl", [HUMAN_EVAL])
    functions = [{"func_documentation_string": f"Add {n}.", "func_code_string": f"def f(x): return x + {n}"} for n in range(8)]
    write_rows(folder / "csn_python.jsonl", functions)
    talks = [[{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n}!"}] for n in range(8)]
    write_rows(folder / "sharegpt.json", [{"id": str(n), "conversations": talk} for n, talk in enumerate(talks)])
    write_sql_questions([str(folder / "spider"), "8", "4"])
    for part in ("data", "eval", "examples"):
        shutil.copytree(ROOT / part, folder / part)
    (folder / "cllm").mkdir()
    shutil.copy(ROOT / "cllm" / "train_cllm.sh", folder / "cllm")
    (folder / "docs").mkdir()
    (folder / "docs" / "results").symlink_to(ROOT / "docs" / "results")
    collect = f"collect --task gsm8k --model {model} --filename {folder}/gsm8k_train.jsonl --output {folder}/trajectories"
    cllm_main(shlex.split(f"{collect} --max_new_tokens 4 {REDUCED['collect']}"))
    return folder


class Reader:
    """Follows a page in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.names: dict[str, Any] = {"__name__": "page"}
        self.servers: list[subprocess.Popen[str]] = []
        self.address = ADDRESS

    def do(self, block: Block) -> None:
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    self.run(words)
        else:
            exec(compile(block.text.replace(ADDRESS, self.address), "page", "exec"), self.names)

    def run(self, words: list[str]) -> None:
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1 + 1?\n"), encoding="utf-8"))
        match words:
            case ["cd", folder]:
                self.monkeypatch.chdir(folder)
            case ["pip", "install", "-e", what, *_]:
                extras = set(re.findall(r"[\w-]+", what.partition("[")[2]))
                assert extras <= set((ROOT / "pyproject.toml").read_text().split()), extras
            case ["cllm", "serve", *_] | ["cllm", "demo", _]:
                self.serve(words)
            case ["cllm", command, *_]:
                self.remove_outputs(words)
                succeeds(lambda: cllm_main(words[1:] + REDUCED.get(command, "").split()))
            case ["python", "-m", module, *rest]:
                self.script(module, rest + REDUCED["chat"].split(), runpy.run_module)
            case ["python", script, *rest]:
                command = "collect" if "trajectory" in script else Path(script).stem
                self.remove_outputs(words)
                self.script(script, rest + REDUCED.get(command, "").split(), runpy.run_path)
            case ["bash", script, *rest]:
                environment = os.environ | {"PYTHONPATH": str(ROOT)}
                subprocess.run(["bash", script, *rest, *REDUCED["train"].split()], check=True, env=environment)
            case _:
                pytest.fail(f"do not know how to run {shlex.join(words)}")

    def remove_outputs(self, words: list[str]) -> None:
        """Remove the folders that a command is about to write."""
        written = [words[words.index(option) + 1] for option in OUTPUTS if option in words]
        for folder in [*written, *words[-1:]] if words[1] == "make" else written:
            shutil.rmtree(folder, ignore_errors=True)

    def script(self, target: str, rest: list[str], run: Any) -> None:
        self.monkeypatch.setattr(sys, "argv", [target, *rest])
        succeeds(lambda: run(target, run_name="__main__"))

    def serve(self, words: list[str]) -> None:
        command = [sys.executable, "-m", "cllm", *words[1:], *REDUCED[words[1]].split()]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.servers.append(server)
        assert server.stdout
        line = server.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert match, line
        self.address = match[0]

    def close(self) -> None:
        for server in self.servers:
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) in (0, 130, -signal.SIGINT)
            assert server.stdout
            server.stdout.close()


@pytest.fixture
def reader(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    folder = tmp_path / "reader"
    shutil.copytree(made, folder, symlinks=True)
    save_tiny_adapter(folder / "my-cllm", folder / "my-model")
    monkeypatch.chdir(folder)
    found = Reader(folder, monkeypatch)
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs, blocks(page)))], ids=name)
def test_a_page_can_be_followed(page: Path, reader: Reader) -> None:
    for block in filter(runs, blocks(page)):
        reader.do(block)


# ------------------------------------------------------------ static checks


def test_blocks_that_are_not_run_say_why() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.text.startswith(NOT_RUN):
                assert len(block.text.splitlines()[0]) > len(NOT_RUN) + 8, page


def test_commands_that_are_not_run_exist() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                for command in re.findall(r"^cllm (\w+)", block.text, re.MULTILINE):
                    assert command in COMMANDS, (name(page), command)
                for script in re.findall(r"(?:bash|python) (scripts/\S+)", block.text):
                    assert (ROOT / script).is_file(), (name(page), script)


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_quote, blocks(page)))], ids=name)
def test_quoted_code_is_the_code(page: Path) -> None:
    for block in filter(is_quote, blocks(page)):
        code = [line.strip() for line in (ROOT / block.title).read_text().splitlines()]
        quote = [line.strip() for line in block.text.splitlines()]
        places = [at for at, line in enumerate(code) if line == quote[0] and code[at : at + len(quote)] == quote]
        assert places, block


def anchors(page: Path) -> set[str]:
    """The link fragments of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path, _, fragment = target.partition("#")
            place = page.parent / path if path else page
            assert place.exists(), target
            assert not fragment or fragment in anchors(place), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.is_relative_to(ROOT / "docs")], ids=name)
def test_a_page_begins_with_its_purpose(page: Path) -> None:
    if page.name not in ("changelog.md", "index.md"):
        title, _, first = page.read_text().split("\n", 3)[:3]
        assert title.startswith("# ") and first.startswith("This page ")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_mask_picture_is_up_to_date() -> None:
    assert (ROOT / "docs" / "images" / "mask.svg").read_text(encoding="utf-8") == picture()
