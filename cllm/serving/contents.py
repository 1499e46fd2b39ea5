"""Which files go into an export, and whether the requested export is possible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from cllm.adapter import ADAPTER, ADAPTER_FOLDER, ADAPTER_WEIGHTS, BASE_REVISION, LOSSLESS
from cllm.errors import UsageError
from cllm.models import check_path, first_line, folder_record, load_model, load_tokenizer, vocabulary_stamp

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
FILES = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "*tokenizer*", "*token*.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "LICENSE*", "NOTICE*"),
)  # of a checkpoint; other files of a training run are not exported


def contents(source: Path, name: str, adapter_only: bool) -> dict[str, Path]:
    """The files to copy from the folder ``source``, by their names in the export; error messages call the folder ``name``.

    A consistency adapter comes with its target model, or alone with ``adapter_only``. Alone, its configuration is the last
    file. With the target, the configuration is missing here, because the export has to change it.

    Raises UsageError for a folder without weights, for an adapter that does not fit its target model or must be merged first,
    and for ``adapter_only`` without a consistency adapter.
    """
    record = folder_record(source)
    if not (record.get(LOSSLESS) and (source / ADAPTER).is_file()):
        if adapter_only:
            raise UsageError(f"adapter_only needs a folder that `cllm train --lossless` wrote, got {name}")
        return _checkpoint(source, name)
    load_model(str(source), dtype="bfloat16", device="cpu")  # raises if the target is missing or the adapter does not fit it
    named = json.loads((source / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    base = checkpoint_folder(named, record.get(BASE_REVISION))
    if vocabulary_stamp(load_tokenizer(str(source))) != vocabulary_stamp(load_tokenizer(str(base))):
        raise UsageError(f"the tokenizer in {name} has a different vocabulary from its target model, {named}")
    if adapter_only:
        own = {path.name: path for path in _known(source) if not matches(path.name, WEIGHTS)}
        return own | {file: source / file for file in (ADAPTER_WEIGHTS, ADAPTER)}
    return _checkpoint(base, named) | {f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}": source / ADAPTER_WEIGHTS}


def checkpoint_folder(model: str, revision: str | None = None) -> Path:
    """The checkpoint's folder, downloaded if ``model`` is a hub name. Raises UsageError if there is none."""
    check_path(model)
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*FILES, ADAPTER, f"{ADAPTER_FOLDER}/*"]))
    except Exception as error:  # network, hub and library errors have no common base
        raise UsageError(f"cannot fetch {model!r} from the Hugging Face hub: {first_line(error)}") from error


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _checkpoint(folder: Path, name: str) -> dict[str, Path]:
    """The files of a checkpoint with weights, including the adapter if it is an export with one."""
    if (folder / ADAPTER).is_file():
        raise UsageError(f"{name} holds a LoRA adapter that must be merged into its model's weights first (--merge_lora)")
    files = {path.name: path for path in _known(folder)}
    if not any(matches(file, WEIGHTS) for file in files):
        raise UsageError(f"no weights in {name}; expected one of {', '.join(WEIGHTS)}")
    beside = sorted((folder / ADAPTER_FOLDER).glob("*"), reverse=True) if folder_record(folder).get(LOSSLESS) else []
    return files | {f"{ADAPTER_FOLDER}/{path.name}": path for path in beside}


def _known(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and matches(path.name, FILES))
