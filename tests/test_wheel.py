"""The wheel: what it holds, and that it works without the checkout."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from commands import write_rows
from pages import ROOT, blocks, runs
from tiny import save_tiny_adapter, save_tiny_checkpoint

import cllm

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # PYTHONPATH would find the checkout
SNIPPETS = [ROOT / "README.md", *sorted((ROOT / "docs" / "concepts").glob("*.md"))]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", "77", reason="building a wheel needs setuptools 77")
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")  # building leaves files in the source folder
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "cllm", source / "cllm", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*build, "--wheel-dir", folder, source], env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def new_environment(folder: Path) -> Path:
    """The scripts of an environment without cllm, which borrows the packages that the wheel needs from this one."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return folder / "bin"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel in it."""
    scripts = new_environment(tmp_path_factory.mktemp("environment"))
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], env=CLEAN, check=True)
    return scripts


def run(environment: Path, folder: Path, program: str, *words: str) -> str:
    done = subprocess.run([environment / program, *words], cwd=folder, env=CLEAN, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_contents(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    files = ("py.typed", "train_cllm.sh", "configs/fsdp2.yaml", "serving/demo/page.html", "cli/main.py")
    assert {f"cllm/{file}" for file in files} <= names
    assert {name.split("/")[0] for name in names} == {"cllm", f"cllm-{cllm.__version__}.dist-info"}


def test_command_and_version(environment: Path, tmp_path: Path) -> None:
    assert run(environment, tmp_path, "cllm", "--help").startswith("usage: cllm COMMAND")
    ask = "import cllm, importlib.metadata as m; print(cllm.__file__, cllm.__version__ == m.version('cllm'))"
    file, same = run(environment, tmp_path, "python", "-c", ask).split()
    assert same == "True" and Path(file).is_relative_to(environment.parent)


def test_the_snippets_of_readme_and_concepts(environment: Path, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "my-model", max_position_embeddings=2048)
    save_tiny_adapter(tmp_path / "my-cllm", model)
    texts = [b.text for page in SNIPPETS for b in blocks(page) if b.language == "python" and runs(b)]
    assert len(texts) >= len(SNIPPETS)
    (tmp_path / "snippets.py").write_text("\n".join(texts))
    run(environment, tmp_path, "python", "snippets.py")


def test_make_and_the_export_check(environment: Path, tmp_path: Path) -> None:
    """What a model becomes in the wheel's environment decodes in one that has no cllm."""
    pytest.importorskip("peft")
    model = save_tiny_checkpoint(tmp_path / "model", seed=3, max_position_embeddings=1024)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Why {n * n}?"} for n in range(12)])
    made = ["make", str(model), "prompts.jsonl", "made", "--max_new_seq_len", "16", "--device", "cpu", "--dtype", "float32"]
    assert "speedup over AR" in run(environment, tmp_path, "cllm", *made)
    run(environment, tmp_path, "cllm", "export", "made", "exported")
    bare = new_environment(tmp_path / "bare")
    assert "equal to" in run(bare, tmp_path, "python", "-I", str(ROOT / "scripts" / "export_check.py"), "exported")
