"""The software and hardware that a measurement ran on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cllm
from cllm.errors import UsageError
from cllm.files import StrPath
from cllm.processor import processor_name


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions, device, threads and the git revision of this toolkit's source (None where it is not a checkout)."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}
        | {name: _version(name) for name in ("transformers", "cllm")}
        | ({"cuda": torch.version.cuda} if on_gpu else {}),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "git_revision": git_revision(Path(cllm.__file__).parent),
    }


def git_revision(package: Path) -> str | None:
    """The commit of the checkout whose top level holds ``package``, with ``-dirty`` where tracked files were changed.

    None for an installed package, even inside another project's checkout.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    commit = _git(package, "rev-parse", "--verify", "--quiet", "HEAD")
    if not top or not commit or Path(top).resolve() != package.resolve().parent:
        return None
    return commit + ("-dirty" if _git(package, "status", "--porcelain", "--untracked-files=no") else "")


def check_writable(path: StrPath) -> None:
    """Raise UsageError if a result file cannot be written: called before hours are spent on the result."""
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        existed = target.exists()
        with open(target, "ab"):
            pass
        if not existed:
            target.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
