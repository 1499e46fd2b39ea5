"""A checkpoint that decodes by Jacobi iteration wherever transformers loads it, and that says what it is."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from cllm.adapter import ADAPTER, ADAPTER_FOLDER, BASE_REVISION
from cllm.attention import check_model
from cllm.checkpoints import published_record
from cllm.errors import UsageError
from cllm.files import StrPath, write_json, write_text
from cllm.models import (
    HUB_NAME,
    ORIGINS,
    RECORD,
    add_to_record,
    first_line,
    folder_record,
    load_tokenizer,
    read_record,
    stop_token_ids,
)
from cllm.prompts import PLACE, choose_template
from cllm.serving import uno
from cllm.serving.bundle import HEAD, bundle
from cllm.serving.contents import FILES, contents, fetched, matches
from cllm.serving.model_card import MARK, Report, model_card, read_reports

CODE = "custom_generate/generate.py"  # where transformers looks for it
CARD = "README.md"
FOLDERS = (ADAPTER_FOLDER, Path(CODE).parts[0])
FORMS = ("transformers", "uno")
MERGED = (
    "a consistency adapter is not merged: it is on for guesses alone, and in the weights it would be on for every token, which "
    "gives another model and another text"
)

logger = logging.getLogger(__name__)


def export(model: str, output: StrPath, results: Sequence[StrPath] = (), *, adapter_only: bool = False, form: str = FORMS[0]) -> None:
    """Write the checkpoint ``model``, a folder or a hub name, to the folder ``output`` and :func:`equip` it.

    A consistency adapter is written with its target model, in a folder of its own, so that transformers opens the target as it
    is: an adapter beside the weights would be on for every token there. ``adapter_only`` leaves the target model out.
    ``form``: one of FORMS; ``uno`` is the adapter alone, as SGLang's UNO takes it.
    ``output`` must be new, empty, or an earlier export, which is overwritten. ``model`` is only read. Raises UsageError
    for any other folder, for a checkpoint that cannot be loaded or decoded, for an adapter that does not fit its target or the
    form, and for ``merged``.
    """
    if form not in FORMS:
        raise UsageError(MERGED if form == "merged" else f"form must be one of {', '.join(FORMS)}, got {form!r}")
    for_uno = form == "uno"
    adapter_only = adapter_only or for_uno
    source, target = fetched(model), Path(output)
    _check_output(source, target)
    files = contents(source, model, adapter_only)
    if for_uno:
        uno.check(source, folder_record(source))
        files = {name: files[name] for name in uno.FILES}
    for folder in {path.parent for path in files.values()}:  # of the target model, too
        _check_output(folder, target)
    adapted = (source / ADAPTER).is_file()
    skeleton, published = Skeleton(source), published_record(model)  # what the paper's checkpoints do not say themselves
    reports = read_reports(results, skeleton.record or published)
    if adapter_only:  # the card first, or the code, so that an interrupted export can be run again
        more = [uno.usage(skeleton.passed_on)] if for_uno else []
        _write_card(target, skeleton.card(target, reports, alone=True, more=more))
    else:
        write_text(target / CODE, code())
    _remove_strays(target, files, adapter_only)
    for name, path in files.items():
        if adapted and name == "config.json":
            _write_with_record(path, target / name, skeleton.passed_on)
        else:
            copy_file(path, target / name)
    if published:
        add_to_record(target, published)
    if not adapter_only:
        equip(target, results)
        if adapted:
            _add_adapter_config(source, target, skeleton.record)


def equip(folder: StrPath, results: Sequence[StrPath] = ()) -> None:
    """Add to a checkpoint folder: the decoding code, all stop tokens in generation_config.json, and a model card.

    Of folders that the record in config.json names, as the target model's, no more than the name is kept. ``results`` are
    JSON files of ``cllm speedup`` and ``cllm acc`` for the card. A README.md that others wrote stays.
    Raises UsageError for a checkpoint that cannot be loaded or decoded, and for results that are not of it.
    """
    folder = Path(folder)
    skeleton = Skeleton(folder)
    card = skeleton.card(folder, read_reports(results, skeleton.record))
    write_text(folder / CODE, code())
    if skeleton.passed_on != skeleton.record:
        add_to_record(folder, skeleton.passed_on)
    write_text(folder / "generation_config.json", skeleton.generation_config().to_json_string())
    _write_card(folder, card)


def code() -> str:
    """The text of ``custom_generate/generate.py``: it imports no more than torch, transformers and what these need."""
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

    @property
    def passed_on(self) -> dict[str, Any]:
        """The record as an export has it."""
        return self.record | _origins(self.record)

    def card(self, folder: Path, reports: Sequence[Report], alone: bool = False, more: Sequence[str] = ()) -> str:
        """The text of the card in ``folder``. ``alone``: of an adapter without its target model; ``more``: further sections."""
        return model_card(folder.resolve().name, self.passed_on, self.template.text, reports, alone=alone, more=more)

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


def _origins(record: Mapping[str, Any]) -> dict[str, str]:
    """What the checkpoint was made of, in words that mean something elsewhere: hub names, of folders their last parts."""
    paths = {key: str(record[key]) for key in ORIGINS if record.get(key)}
    on_hub = {key for key, path in paths.items() if HUB_NAME.fullmatch(path) and not Path(path).exists()}
    return {key: path if key in on_hub else Path(os.path.abspath(path)).name for key, path in paths.items()}


def _check_output(source: Path, target: Path) -> None:
    """Raise UsageError for a folder that must not be written to."""
    if target.exists() and not target.is_dir() or source.resolve() == target.resolve():
        raise UsageError(f"OUTPUT must be another folder than MODEL's and its target model's, got {target}")
    if target.is_dir() and any(target.iterdir()) and not _is_export(target):
        raise UsageError(f"OUTPUT must be new, empty, or an earlier export, but {target} has other files in it")


def _is_export(folder: Path) -> bool:
    """Whether an export wrote all that is there. A training run has left more; its weights must not be overwritten."""
    if any(not matches(path.name, (*FILES, ADAPTER, CARD, *FOLDERS, ".*")) for path in folder.iterdir()):
        return False
    marks = ((CODE, HEAD), (CARD, MARK))
    return any((folder / name).is_file() and mark in (folder / name).read_text(encoding="utf-8") for name, mark in marks)


def _remove_strays(target: Path, files: Mapping[str, Path], adapter_only: bool) -> None:
    """Remove what an earlier export left and this one does not write: it would be loaded."""
    for path in target.iterdir():
        if path.name not in files and matches(path.name, (*FILES, ADAPTER)):
            path.unlink()
    for name in FOLDERS if adapter_only else (ADAPTER_FOLDER,):
        shutil.rmtree(target / name, ignore_errors=True)


def _add_adapter_config(source: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Finish the adapter beside its target model: with the record, which keeps it from being merged, and without a path."""
    folder = target / ADAPTER_FOLDER
    copy_file(target / "config.json", folder / "config.json")
    config = json.loads((source / ADAPTER).read_text(encoding="utf-8"))
    on_hub = record["target_model"] if record.get(BASE_REVISION) else None
    write_json(folder / ADAPTER, config | {"base_model_name_or_path": on_hub})


def _write_with_record(source: Path, target: Path, record: Mapping[str, Any]) -> None:
    write_json(target, json.loads(source.read_text(encoding="utf-8")) | {RECORD: record})


def _write_card(folder: Path, card: str) -> None:
    if (folder / CARD).exists() and MARK not in (folder / CARD).read_text(encoding="utf-8"):
        logger.warning("%s is kept as it is: it was not written by cllm export", folder / CARD)
    else:
        write_text(folder / CARD, card)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; what is at ``target`` is replaced by the whole of it or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
