"""Loading models and tokenizers, and reading what their configuration says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import enable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from cllm.adapter import ADAPTER, ADAPTER_FOLDER, ADAPTER_WEIGHTS, BASE_REVISION, LOSSLESS, attach_from, attached
from cllm.checkpoints import published_record
from cllm.errors import UsageError
from cllm.files import StrPath, write_json

if TYPE_CHECKING:
    from cllm.prompts import PromptTemplate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_WIDTH = 16  # the paper's block size
DEFAULT_GUESS = "context"  # what the paper's CLLMs are trained with
RECORD = "cllm"  # key in config.json of the record that says how a CLLM was made; the keys below are the record's
WIDTH, DRAFTS, GUESS = "decoding_width", "decoding_drafts", "decoding_guess"  # what to decode with
REASON = "decoding_reason"  # why the width is 1, if `cllm make` found no faster one
DATA = "data"  # where the training prompts came from
TRAINED_GUESS = "guess"  # the fresh guesses used in training
ORIGINS = ("target_model", "base_model")  # the checkpoints that the model was made from
LONGROPE = "longrope"  # rotary embeddings with two sets of frequencies
REREADING = ("phi3", "phimoe", "phi4_multimodal")  # see their prepare_inputs_for_generation
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    path: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    quantization: Any = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model for decoding or training.

    A consistency adapter, alone or exported with its base model, loads as the base model with the adapter attached; any other
    LoRA adapter is merged into its base model.

    ``path``: a folder or a hub name. ``device``: CUDA by default if there is a GPU. ``dtype``: a key of DTYPES, by default
    bfloat16 on a GPU and float32 elsewhere. ``attn_implementation``: the model's own choice by default. ``quantization``: a
    quantization config of transformers. ``revision``: of a hub name.

    Raises UsageError if nothing can be loaded from ``path``, or if weights are missing or do not have the shapes of config.json.
    """
    check_path(path)
    if (folder := _adapter_folder(path)) is not None:
        return _load_adapted(path, folder, dtype=dtype, device=device, attn_implementation=attn_implementation, quantization=quantization)
    device = device or default_device()
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    torch_dtype = DTYPES[dtype] if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    extra: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if revision is not None:
        extra["revision"] = revision
    if quantization is not None:
        extra |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        with _without_loading_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch_dtype, output_loading_info=True, ignore_mismatched_sizes=True, **extra
            )
        model, info = loaded
        model = (model if quantization is not None else model.to(device)).eval()
    except Exception as error:  # with damaged files, the libraries raise almost anything
        raise UsageError(f"cannot load a causal language model from {path!r}: {first_line(error)}") from error
    bad = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if bad:
        some = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise UsageError(f"the weights in {path!r} do not fit its config.json, missing or of another shape: {some}")
    attach_exported(model)
    return cast(PreTrainedModel, model)


def attach_exported(model: PreTrainedModel) -> None:
    """Attach the consistency adapter that was exported with ``model``, found in its ADAPTER_FOLDER.

    Does nothing for other models and for those that have an adapter; warns if the adapter's files are missing. Raises
    UsageError for an adapter of another model.
    """
    record = read_record(model.config)
    if not record.get(LOSSLESS) or attached(model) is not None:
        return
    where: dict[str, Any] = {"subfolder": ADAPTER_FOLDER, "revision": getattr(model.config, "_commit_hash", None)}
    try:
        files = [cached_file(str(model.name_or_path), name, **where) for name in (ADAPTER, ADAPTER_WEIGHTS)]
    except OSError as error:
        log: Any = transformers_logging.get_logger(__name__)
        log.warning_once(f"decoding without the consistency adapter of {model.name_or_path!r}: {first_line(error)}")
        return
    attach_from(Path(str(files[0])).parent, model, record)


def _adapter_folder(path: str) -> Path | None:
    """The local folder of an adapter, downloaded if ``path`` is a hub name; None if ``path`` is not an adapter."""
    if Path(path).is_dir():
        return Path(path) if (Path(path) / ADAPTER).is_file() else None
    try:
        cached_file(path, ADAPTER)
    except OSError:  # no adapter, or no such name, which loading will report
        return None
    return Path(snapshot_download(path, allow_patterns=[ADAPTER, ADAPTER_WEIGHTS, "config.json"]))


def _load_adapted(path: str, folder: Path, *, quantization: Any = None, **how: str | None) -> PreTrainedModel:
    """Load the base model of the adapter in ``folder``, and attach a consistency adapter or merge any other.

    If the folder has a config.json, its record becomes the model's.
    """
    record = folder_record(folder)
    if quantization is not None and not record.get(LOSSLESS):
        raise UsageError(f"{path!r} holds a LoRA adapter, which cannot be merged into weights in 4 bits; merge it first")
    try:
        base = _base_of(folder, json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"])
        revision = record.get(BASE_REVISION) if base and not Path(base).is_dir() else None
        model = load_model(base, quantization=quantization, revision=revision, **how)
    except UsageError as error:
        raise UsageError(f"the base model of the adapter in {path!r}: {error}; {ADAPTER} names it as base_model_name_or_path") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"cannot load the adapter in {path!r}: {first_line(error)}") from error
    if record.get(LOSSLESS):
        attach_from(folder, model, record)
    else:
        model = _merged(model, path)
    model.name_or_path = path  # it is no longer just the base model
    if (folder / "config.json").is_file():
        write_record(model.config, record)
    return model


def _base_of(folder: Path, named: str | None) -> Any:
    """The base model's path: the one ``named`` by the adapter, or the folder of that name next to a moved adapter."""
    if named is None:  # an export's adapter, whose base model surrounds it
        return None
    beside = folder.resolve().parent / Path(named).name
    moved = Path(named).is_absolute() and not Path(named).exists() and beside.is_dir()
    return str(beside) if moved else named


def _merged(model: PreTrainedModel, path: str) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError(f"{path!r} holds a LoRA adapter, which needs peft: pip install -e .[lora]") from error
    try:
        adapted: Any = PeftModel.from_pretrained(model, path)
    except Exception as error:  # as in load_model
        raise UsageError(f"cannot load the adapter in {path!r}: {first_line(error)}") from error
    return cast(PreTrainedModel, adapted.merge_and_unload())


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a checkpoint. Raises UsageError where there is none."""
    check_path(path)
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(path))
    except Exception as error:  # as in load_model
        raise UsageError(f"cannot read the configuration of {path!r}: {first_line(error)}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; a missing padding token is replaced by the end-of-sequence token.

    Raises UsageError if it cannot be loaded or has no end-of-sequence token.
    """
    check_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # as in load_model
        no_files = Path(path).is_dir() and not [*Path(path).glob("*token*"), *Path(path).glob("vocab*")]
        reason = "it has no tokenizer files" if no_files else first_line(error)
        raise UsageError(f"cannot load a tokenizer from {path!r}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {path!r} has no end-of-sequence token, so no response could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_stamp(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the mapping from ids to tokens, independent of a tokenizer's merges, templates and files."""
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def check_path(path: str) -> None:
    """Raise UsageError unless ``path`` is a folder or looks like a hub name."""
    if not path or not Path(path).is_dir() and (Path(path).exists() or not HUB_NAME.fullmatch(path)):
        raise UsageError(f"model must be a checkpoint folder or a hub name, got {path!r}, which is neither")


def embedding_device(model: PreTrainedModel) -> torch.device:
    """The device that token ids must be on."""
    return next(model.get_input_embeddings().parameters()).device


def embedding_count(model: PreTrainedModel) -> int:
    """The number of token ids that the model accepts; its logits may have fewer."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return int(size or model.config.get_text_config(decoder=True).vocab_size)


def context_length(config: PretrainedConfig) -> int | None:
    """The model's context length in tokens, None if its configuration sets no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def packed_length(config: PretrainedConfig) -> int | None:
    """The longest text in a packed forward, in tokens: bounded by the context, and with longrope by its frequency switch."""
    bounds = (context_length(config), rotary_switch(config))
    return min((bound for bound in bounds if bound is not None), default=None)


def rotary_switch(config: PretrainedConfig) -> int | None:
    """The first position with different rotary frequencies (longrope); None if all positions have the same."""
    ropes: Any = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [ropes, *(kind for kind in ropes.values() if isinstance(kind, dict))]  # one for all layers, or one per layer type
    switches = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == LONGROPE]
    return min(switches, default=None)


def reread_length(config: PretrainedConfig) -> int | None:
    """The length at which ``generate`` recomputes the whole text with other rotary frequencies; None: never."""
    if config.model_type not in REREADING or rotary_switch(config) is None:
        return None
    return int(config.original_max_position_embeddings) + 1


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate | None = None) -> list[int]:
    """All ids that end a response, sorted: the generation config's, the tokenizer's and the prompt template's."""
    ids = {tokenizer.eos_token_id, *(template.stop_ids(tokenizer) if template is not None else [])}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ids |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return sorted(ids)


def read_record(config: PretrainedConfig) -> dict[str, Any]:
    """The record in config.json of how a CLLM was made: block_size, prompt_template, ...; {} for a target model.

    The paper's checkpoints have none; loaded by their hub names they get the one in :mod:`cllm.checkpoints`.
    """
    return dict(getattr(config, RECORD, None) or published_record(getattr(config, "_name_or_path", None)))


def folder_record(folder: StrPath) -> dict[str, Any]:
    """The record in a folder's config.json; {} if there is none. Raises UsageError for a damaged file."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).get(RECORD) or {})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"not a valid JSON file: {file} ({first_line(error)})") from error


def write_record(config: PretrainedConfig, record: Mapping[str, Any]) -> None:
    setattr(config, RECORD, dict(record))


def default_width(record: Mapping[str, Any]) -> int:
    """The window width to decode with: the one stored by ``cllm tune``, else the block size in training."""
    return int(record.get(WIDTH) or record.get("block_size") or DEFAULT_WIDTH)


def default_drafts(record: Mapping[str, Any], width: int) -> int:
    """How many draft tokens to use with a window of ``width``: what ``cllm tune`` stored for it, else one per guess."""
    stored = record.get(DRAFTS) if record.get(WIDTH) == width else None
    return width - 1 if stored is None else int(stored)


def default_guess(record: Mapping[str, Any]) -> str:
    """The name of the fresh guesses to decode with: those stored by ``cllm tune``, else those of training."""
    return str(record.get(GUESS) or record.get(TRAINED_GUESS) or DEFAULT_GUESS)


def store_choice(path: str, width: int, guess: str, drafts: int = 0) -> None:
    """Store the default width, guess and drafts in a checkpoint's record.

    Raises UsageError unless ``path`` is a local checkpoint.
    """
    add_to_record(path, {WIDTH: width, DRAFTS: drafts, GUESS: guess})


def add_to_record(path: StrPath, entries: Mapping[str, Any]) -> None:
    """Add ``entries`` to the record in a checkpoint's config.json, atomically.

    Raises UsageError unless ``path`` is a local checkpoint.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UsageError(f"only local checkpoints have a record to write to; there is no {file}")
    config = json.loads(file.read_text(encoding="utf-8"))
    config[RECORD] = (config.get(RECORD) or {}) | dict(entries)
    write_json(file, config)


def weights_stamp(path: StrPath) -> str | None:
    """A hash of the names, sizes and times of a checkpoint folder's files, so that results of two models are never mixed.

    None if ``path`` is not a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in (*sorted(folder.iterdir()), *sorted((folder / ADAPTER_FOLDER).glob("*"))):
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model"):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _without_loading_bar() -> Iterator[None]:
    """Hide transformers' "Loading weights" bar, but keep the bars of downloads."""
    shown = transformers_logging.is_progress_bar_enabled()
    if not shown:
        yield
        return
    transformers_logging.disable_progress_bar()
    enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, and the second if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
