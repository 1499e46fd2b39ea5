"""Exporting checkpoints that decode by Jacobi iteration wherever transformers loads them, with a model card."""

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
from cllm.prompts import QUESTION, choose_template
from cllm.serving import uno
from cllm.serving.bundle import HEAD, bundle
from cllm.serving.contents import FILES, checkpoint_folder, contents, matches
from cllm.serving.model_card import MARK, Report, model_card, read_reports

CODE = "custom_generate/generate.py"  # where transformers looks for it
CARD = "README.md"
FOLDERS = (ADAPTER_FOLDER, Path(CODE).parts[0])
FORMS = ("transformers", "uno")
MERGED = (
    "a consistency adapter cannot be merged: it must be on for guesses only; merged into the weights it would be on for every "
    "token, which gives another model and another text"
)

logger = logging.getLogger(__name__)


def export(model: str, output: StrPath, results: Sequence[StrPath] = (), *, adapter_only: bool = False, form: str = FORMS[0]) -> None:
    """Copy the checkpoint ``model``, a folder or a hub name, to the folder ``output`` and :func:`equip` it.

    A consistency adapter is exported with its target model, in a folder of its own, so that transformers loads the plain
    target: it would switch on an adapter next to the weights for every token. ``adapter_only`` omits the target model.
    ``results``: JSON files of ``cllm speedup`` and ``cllm acc`` for the model card.
    ``form``: one of FORMS; ``uno`` is the adapter alone, as SGLang's UNO takes it.
    ``output`` must be new, empty, or an earlier export, which is overwritten. ``model`` is only read.

    Raises UsageError for any other output folder, for a checkpoint that cannot be loaded or decoded, for an adapter that does
    not fit its target or the form, and for the form ``merged``.
    """
    if form not in FORMS:
        raise UsageError(MERGED if form == "merged" else f"form must be one of {', '.join(FORMS)}, got {form!r}")
    for_uno = form == "uno"
    adapter_only = adapter_only or for_uno
    source, target = checkpoint_folder(model), Path(output)
    _check_output(source, target)
    files = contents(source, model, adapter_only)
    if for_uno:
        uno.check(source, folder_record(source))
        files = {name: files[name] for name in uno.FILES}
    for folder in {path.parent for path in files.values()}:  # including the target model's
        _check_output(folder, target)
    adapted = (source / ADAPTER).is_file()
    skeleton, published = Skeleton(source), published_record(model)  # the paper's checkpoints have no record of their own
    reports = read_reports(results, skeleton.record or published)
    if adapter_only:  # write the card (or the code) first: it marks the folder as an export, so an interrupted one can be rerun
        more = [uno.usage(skeleton.exported_record)] if for_uno else []
        _write_card(target, skeleton.card(target, reports, alone=True, more=more))
    else:
        write_text(target / CODE, code())
    _remove_strays(target, files, adapter_only)
    for name, path in files.items():
        if adapted and name == "config.json":
            _write_with_record(path, target / name, skeleton.exported_record)
        else:
            copy_file(path, target / name)
    if published:
        add_to_record(target, published)
    if not adapter_only:
        equip(target, results)
        if adapted:
            _add_adapter_config(source, target, skeleton.record)


def equip(folder: StrPath, results: Sequence[StrPath] = ()) -> None:
    """Add the decoding code, all stop tokens (in generation_config.json) and a model card to a checkpoint folder.

    Paths in the record in config.json, such as the target model's, are reduced to folder names. ``results``: JSON files of
    ``cllm speedup`` and ``cllm acc`` for the card. A README.md that is not from an export is kept.
    Raises UsageError for a checkpoint that cannot be loaded or decoded, and for results of another checkpoint.
    """
    folder = Path(folder)
    skeleton = Skeleton(folder)
    card = skeleton.card(folder, read_reports(results, skeleton.record))
    write_text(folder / CODE, code())
    if skeleton.exported_record != skeleton.record:
        add_to_record(folder, skeleton.exported_record)
    write_text(folder / "generation_config.json", skeleton.generation_config().to_json_string())
    _write_card(folder, card)


def code() -> str:
    """The source of ``custom_generate/generate.py``, which imports only torch, transformers and their dependencies."""
    return bundle("cllm.custom_generate", "generate")


class Skeleton:
    """A checkpoint without its weights, which suffices to check that it can be decoded and to find its stop tokens."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError unless it is a causal language model that can be decoded."""
        try:
            config = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # with damaged files, the libraries raise almost anything
            raise UsageError(f"cannot load a causal language model from {str(folder)!r}: {first_line(error)}") from error
        check_model(self.model)
        self.folder, self.record, self.tokenizer = folder, read_record(config), load_tokenizer(str(folder))
        self.template = choose_template(None, QUESTION, self.tokenizer, self.record)

    @property
    def exported_record(self) -> dict[str, Any]:
        """The record to put into an export, without local paths."""
        return self.record | _origins(self.record)

    def card(self, folder: Path, reports: Sequence[Report], alone: bool = False, more: Sequence[str] = ()) -> str:
        """The text of the card in ``folder``. ``alone``: an adapter without its target model; ``more``: further sections."""
        return model_card(folder.resolve().name, self.exported_record, self.template.text, reports, alone=alone, more=more)

    def generation_config(self) -> GenerationConfig:
        """The checkpoint's generation config, with all ids that end a response and with a padding id."""
        if (self.folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self.folder)
        config = self.model.generation_config
        stops = stop_token_ids(self.model, self.tokenizer, self.template)
        config.eos_token_id = stops[0] if len(stops) == 1 else stops
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        return config


def _origins(record: Mapping[str, Any]) -> dict[str, str]:
    """The ORIGINS in a record without local paths: hub names as they are, folders by their last part."""
    paths = {key: str(record[key]) for key in ORIGINS if record.get(key)}
    on_hub = {key for key, path in paths.items() if HUB_NAME.fullmatch(path) and not Path(path).exists()}
    return {key: path if key in on_hub else Path(os.path.abspath(path)).name for key, path in paths.items()}


def _check_output(source: Path, target: Path) -> None:
    """Raise UsageError for a folder that must not be written to."""
    if target.exists() and not target.is_dir() or source.resolve() == target.resolve():
        raise UsageError(f"OUTPUT must differ from the folders of MODEL and its target model, got {target}")
    if target.is_dir() and any(target.iterdir()) and not _is_export(target):
        raise UsageError(f"OUTPUT must be new, empty, or an earlier export, but {target} has other files in it")


def _is_export(folder: Path) -> bool:
    """Whether everything in ``folder`` is an export's. A training run has other files, and must not be overwritten."""
    if any(not matches(path.name, (*FILES, ADAPTER, CARD, *FOLDERS, ".*")) for path in folder.iterdir()):
        return False
    marks = ((CODE, HEAD), (CARD, MARK))
    return any((folder / name).is_file() and mark in (folder / name).read_text(encoding="utf-8") for name, mark in marks)


def _remove_strays(target: Path, files: Mapping[str, Path], adapter_only: bool) -> None:
    """Remove files of an earlier export that this one does not replace, since they would be loaded."""
    for path in target.iterdir():
        if path.name not in files and matches(path.name, (*FILES, ADAPTER)):
            path.unlink()
    for name in FOLDERS if adapter_only else (ADAPTER_FOLDER,):
        shutil.rmtree(target / name, ignore_errors=True)


def _add_adapter_config(source: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Complete the adapter next to its target model: add the record, which prevents merging, and remove the base's path."""
    folder = target / ADAPTER_FOLDER
    copy_file(target / "config.json", folder / "config.json")
    config = json.loads((source / ADAPTER).read_text(encoding="utf-8"))
    on_hub = record["target_model"] if record.get(BASE_REVISION) else None
    write_json(folder / ADAPTER, config | {"base_model_name_or_path": on_hub})


def _write_with_record(source: Path, target: Path, record: Mapping[str, Any]) -> None:
    write_json(target, json.loads(source.read_text(encoding="utf-8")) | {RECORD: record})


def _write_card(folder: Path, card: str) -> None:
    if (folder / CARD).exists() and MARK not in (folder / CARD).read_text(encoding="utf-8"):
        logger.warning("%s is kept unchanged: it was not written by cllm export", folder / CARD)
    else:
        write_text(folder / CARD, card)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
