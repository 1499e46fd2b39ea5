"""A checkpoint that decodes by Jacobi iteration wherever transformers loads it, and that says what it is."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from cllm.attention import check_model
from cllm.checkpoints import published_record
from cllm.errors import UsageError
from cllm.files import StrPath, write_text
from cllm.models import (
    HUB_NAME,
    ORIGINS,
    add_to_record,
    check_path,
    first_line,
    load_tokenizer,
    read_record,
    stop_token_ids,
)
from cllm.prompts import PLACE, choose_template
from cllm.serving.bundle import HEAD, bundle
from cllm.serving.model_card import MARK, model_card, read_reports

CODE = "custom_generate/generate.py"  # where transformers looks for it
CARD = "README.md"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
FILES = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "*tokenizer*", "*token*.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "LICENSE*", "NOTICE*"),
)  # of a checkpoint; what a training run leaves beside them is not copied

logger = logging.getLogger(__name__)


def export(model: str, output: StrPath, results: Sequence[StrPath] = ()) -> None:
    """Write the checkpoint ``model``, a folder or a hub name, to the folder ``output`` and :func:`equip` it.

    ``output`` must be new, empty, or an earlier export, which is overwritten. ``model`` is only read. Raises UsageError
    for any other folder, and for a checkpoint that cannot be loaded or decoded.
    """
    source, target = _fetched(model), Path(output)
    if target.exists() and not target.is_dir() or source.resolve() == target.resolve():
        raise UsageError(f"OUTPUT must be another folder than MODEL, got {target}")
    if target.is_dir() and any(target.iterdir()) and not _is_export(target):
        raise UsageError(f"OUTPUT must be new, empty, or an earlier export, but {target} has other files in it")
    names = sorted(path.name for path in source.iterdir() if path.is_file() and _matches(path.name, FILES))
    if not any(_matches(name, WEIGHTS) for name in names):
        raise UsageError(f"no weights in {model}; expected one of {', '.join(WEIGHTS)}")
    published = published_record(model)  # what the paper's checkpoints do not say themselves
    read_reports(results, Skeleton(source).record or published)
    write_text(target / CODE, code())  # first, so that an interrupted export can be run again
    for path in target.iterdir():
        if path.name not in names and _matches(path.name, FILES):
            path.unlink()
    for name in names:
        _copy(source / name, target / name)
    if published:
        add_to_record(target, published)
    equip(target, results)


def equip(folder: StrPath, results: Sequence[StrPath] = ()) -> None:
    """Add to a checkpoint folder: the decoding code, all stop tokens in generation_config.json, and a model card.

    Of folders that the record in config.json names, as the target model's, no more than the name is kept. ``results`` are
    JSON files of ``cllm speedup`` and ``cllm acc`` for the card. A README.md that others wrote stays.
    Raises UsageError for a checkpoint that cannot be loaded or decoded, and for results that are not of it.
    """
    folder = Path(folder)
    skeleton = Skeleton(folder)
    reports = read_reports(results, skeleton.record)
    origins = _origins(skeleton.record)
    card = model_card(folder.resolve().name, skeleton.record | origins, skeleton.template.text, reports)
    write_text(folder / CODE, code())
    if origins != {key: skeleton.record[key] for key in origins}:
        add_to_record(folder, origins)
    write_text(folder / "generation_config.json", skeleton.generation_config().to_json_string())
    if (folder / CARD).exists() and MARK not in (folder / CARD).read_text(encoding="utf-8"):
        logger.warning("%s is kept as it is: it was not written by cllm export", folder / CARD)
    else:
        write_text(folder / CARD, card)


def code() -> str:
    """The text of ``custom_generate/generate.py``: standard library, torch and transformers are all that it imports."""
    return bundle("cllm.custom_generate", "generate")


class Skeleton:
    """A checkpoint without its weights: enough to know whether it can be decoded, and where its responses end."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError where it is no causal language model, or one that cannot be decoded."""
        try:
            config = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # damaged files make the libraries raise nearly anything
            raise UsageError(f"cannot load a causal language model from {str(folder)!r}: {first_line(error)}") from error
        check_model(self.model)
        self.folder, self.record, self.tokenizer = folder, read_record(config), load_tokenizer(str(folder))
        self.template = choose_template(None, PLACE, self.tokenizer, self.record)

    def generation_config(self) -> GenerationConfig:
        """The checkpoint's own, with every id that ends a response and with a padding id."""
        if (self.folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self.folder)
        config = self.model.generation_config
        stops = stop_token_ids(self.model, self.tokenizer, self.template)
        config.eos_token_id = stops[0] if len(stops) == 1 else stops
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        return config


def _fetched(model: str) -> Path:
    """The checkpoint's folder, downloaded where ``model`` is a hub name. Raises UsageError where there is none."""
    check_path(model)
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except Exception as error:  # of the network, of the hub, of the library: no common base
        raise UsageError(f"cannot fetch {model!r} from the Hugging Face hub: {first_line(error)}") from error


def _origins(record: Mapping[str, Any]) -> dict[str, str]:
    """What the checkpoint was made of, in words that mean something elsewhere: hub names, of folders their last parts."""
    paths = {key: str(record[key]) for key in ORIGINS if record.get(key)}
    on_hub = {key for key, path in paths.items() if HUB_NAME.fullmatch(path) and not Path(path).exists()}
    return {key: path if key in on_hub else Path(os.path.abspath(path)).name for key, path in paths.items()}


def _is_export(folder: Path) -> bool:
    """Whether an export wrote all that is there. A training run has left more; its weights must not be overwritten."""
    ours = (CARD, Path(CODE).parts[0], ".*")
    if any(not _matches(path.name, (*FILES, *ours)) for path in folder.iterdir()):
        return False
    return (folder / CODE).is_file() and (folder / CODE).read_text(encoding="utf-8").startswith(HEAD)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _copy(source: Path, target: Path) -> None:
    """Copy a file; what is at ``target`` is replaced by the whole of it or not at all."""
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
