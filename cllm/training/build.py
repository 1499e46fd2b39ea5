"""From a target model and its trajectories to a trainer: of all weights, of LoRA adapters, or of a consistency adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.adapter import BASE, BASE_REVISION, LOSSLESS, fingerprint
from cllm.attention import MASKABLE, TRAINABLE, check_model
from cllm.decoding.guess import STARTS
from cllm.errors import UsageError
from cllm.models import (
    DEFAULT_GUESS,
    TRAINED_GUESS,
    load_model,
    load_tokenizer,
    packed_length,
    stop_token_ids,
    vocabulary_stamp,
    write_record,
)
from cllm.options import LOSSLESS_BLOCK
from cllm.serving.export import equip
from cllm.training.arguments import LOSSLESS_OBJECTIVE, OBJECTIVE_FIELDS, CllmTrainingArguments, LosslessTrainingArguments
from cllm.training.drafts import DraftCollator, DraftDataset
from cllm.training.examples import Collator, ExampleDataset
from cllm.training.lora import AdapterArguments, LoraArguments, add_adapter
from cllm.training.lossless import LosslessTrainer
from cllm.training.probing import ProbeArguments, watch, watch_drafts
from cllm.training.run import ModelLoading, checkpoint, data_seed, make_trainer, open_weights, train_and_save, whole_weights
from cllm.training.trainer import CllmTrainer
from cllm.trajectory.store import TrajectoryDataset


@dataclass
class TrainingInputs(ModelLoading):
    """What to train from."""

    model: str = field(kw_only=True, metadata={"help": "the target model: checkpoint folder or hub name"})
    trajectories: str = field(metadata={"help": "a folder that `cllm collect` wrote, a published JSON file, or a hub name of either"})
    block_size: int | None = field(
        default=None, metadata={"help": f"block size n; default: that of the collection, {LOSSLESS_BLOCK} for --lossless"}
    )


@dataclass(frozen=True)
class Source:
    """What is trained from, checked to fit together."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    rows: TrajectoryDataset
    settings: Mapping[str, Any]  # of the collection
    record: dict[str, Any]  # what every objective's record says
    loading: dict[str, Any]  # how the model is loaded


def train(
    inputs: TrainingInputs,
    args: CllmTrainingArguments | LosslessTrainingArguments,
    *,
    lora: AdapterArguments | None = None,
    probe: ProbeArguments | None = None,
) -> None:
    """Fine-tune a target model into a CLLM (arXiv 2403.00835, section 3.2), or train a consistency adapter for it.

    :func:`build_trainer` explains the arguments. The result is in ``args.output_dir``: a checkpoint that decodes by Jacobi
    iteration in plain transformers as well, or an adapter. ``args.resume_from_checkpoint`` continues an interrupted run.
    Raises UsageError where the parts do not fit together and for a full disk.
    """
    resume_from = checkpoint(args)
    lora = lora or default_adapters(args)
    trainer = build_trainer(inputs, args, lora=lora, probe=probe)
    train_and_save(trainer, resume_from, lora, inputs.dtype)
    if trainer.is_world_process_zero() and (lora.merged or not lora.lora_r):
        equip(str(args.output_dir))


def build_trainer(
    inputs: TrainingInputs,
    args: CllmTrainingArguments | LosslessTrainingArguments,
    *,
    lora: AdapterArguments | None = None,
    probe: ProbeArguments | None = None,
) -> CllmTrainer | LosslessTrainer:
    """A trainer with the model, the data and the checks that it needs; ``train()`` runs it.

    The class of ``args`` decides what is trained: a CLLM, or with :class:`LosslessTrainingArguments` a consistency adapter, which
    drafts while the target model, unchanged, decides the text. ``lora``: its size, or LoRA adapters instead of all weights of a
    CLLM. ``probe``: checks on held-out prompts during training; none by default. Raises UsageError where model, trajectories and
    options do not fit together.
    """
    lora = lora or default_adapters(args)
    source = _open(inputs, lora, args)
    if isinstance(args, LosslessTrainingArguments):
        return _lossless_trainer(source, lora, probe or ProbeArguments(), args)
    return _cllm_trainer(source, inputs, lora, probe or ProbeArguments(), args)


def default_adapters(args: CllmTrainingArguments | LosslessTrainingArguments) -> AdapterArguments:
    """An adapter of the default rank for lossless training, otherwise none."""
    return AdapterArguments() if isinstance(args, LosslessTrainingArguments) else LoraArguments()


def _open(inputs: TrainingInputs, lora: AdapterArguments, args: CllmTrainingArguments | LosslessTrainingArguments) -> Source:
    tokenizer = load_tokenizer(inputs.model)
    loading = inputs.load_options() | lora.load_options(str(args.device))
    model = open_weights(inputs.model, **loading)
    check_model(model, MASKABLE if isinstance(args, LosslessTrainingArguments) else TRAINABLE)
    rows = TrajectoryDataset(inputs.trajectories, eos_ids=stop_token_ids(model, tokenizer))
    settings = rows.settings or {}
    _check_vocabulary(rows, settings, model.config.get_text_config(decoder=True).vocab_size, vocabulary_stamp(tokenizer))
    default_block = LOSSLESS_BLOCK if isinstance(args, LosslessTrainingArguments) else settings.get("block_size")
    record = {
        "block_size": _block_size(inputs, default_block),
        "prompt_template": settings.get("prompt_template"),
        "task": settings.get("task"),
        "target_model": inputs.model,
        "responses": len(rows),
        TRAINED_GUESS: settings.get("guess", DEFAULT_GUESS),
    }
    return Source(tokenizer, model, rows, settings, record, loading)


def _cllm_trainer(
    source: Source, inputs: TrainingInputs, lora: AdapterArguments, probe: ProbeArguments, args: CllmTrainingArguments
) -> CllmTrainer:
    _check_blocks(source, inputs)
    model, tokenizer = source.model, source.tokenizer
    frozen = args.needs_target and not lora.lora_r  # adapters that are off give the target model again
    with whole_weights(args):
        target = load_model(inputs.model, **source.loading) if frozen or probe.probe_prompts else None
    dataset = ExampleDataset(source.rows, args.state_sampling, data_seed(args), packed_length(model.config))
    write_record(model.config, source.record | {name: getattr(args, name) for name in OBJECTIVE_FIELDS} | lora.record())
    trainer: CllmTrainer = make_trainer(
        CllmTrainer,
        args,
        model=add_adapter(model, lora, args.seed),
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id, args.distance_decay, args.max_row_tokens),
        processing_class=tokenizer,
        target_model=target if frozen else None,
    )
    if probe.probe_prompts:
        watch(trainer, probe, target)
    return trainer


def _lossless_trainer(source: Source, lora: AdapterArguments, probe: ProbeArguments, args: LosslessTrainingArguments) -> LosslessTrainer:
    model, record = source.model, source.record
    context = packed_length(model.config)
    if context is not None and record["block_size"] >= context:
        raise UsageError(f"block_size must be below the model's context of {context}, got {record['block_size']}")
    guess = STARTS[record[TRAINED_GUESS]](model.config.get_text_config(decoder=True).vocab_size)
    made = {LOSSLESS: True, BASE: fingerprint(model)}
    revision = getattr(model.config, "_commit_hash", None)
    if revision and not Path(record["target_model"]).is_dir():
        made[BASE_REVISION] = revision
    objective = {name: getattr(args, name) for name in LOSSLESS_OBJECTIVE}
    write_record(model.config, record | made | objective | lora.record())
    trainer: LosslessTrainer = make_trainer(
        LosslessTrainer,
        args,
        model=add_adapter(model, lora, args.seed),
        train_dataset=DraftDataset(source.rows, record["block_size"], args.states_per_block, guess, data_seed(args), context),
        data_collator=DraftCollator(source.tokenizer.pad_token_id),
        processing_class=source.tokenizer,
    )
    if probe.probe_prompts:
        watch_drafts(trainer, probe)
    return trainer


def _block_size(inputs: TrainingInputs, default: int | None) -> int:
    if inputs.block_size is not None and inputs.block_size < 1:
        raise UsageError(f"block_size must be >= 1, got {inputs.block_size}")
    size = inputs.block_size or default
    if size is None:
        raise UsageError(f"{inputs.trajectories} does not say its block size; pass --block_size")
    return size


def _check_blocks(source: Source, inputs: TrainingInputs) -> None:
    """Raise UsageError unless blocks of the block size are stored with their states."""
    size, stored = source.record["block_size"], source.settings.get("block_size")
    if source.settings.get("responses_only"):
        raise UsageError(f"{inputs.trajectories} was collected with --responses_only, which is enough for --lossless alone")
    if stored not in (None, size):
        raise UsageError(f"block_size is {size}, but {inputs.trajectories} was collected with {stored}")
    if stored is None:  # a published file: every block but a response's last one is full
        sizes = {end - start for row in source.rows for start, end in row.spans()[:-1]} - {size}
        if sizes:
            raise UsageError(f"block_size is {size}, but {inputs.trajectories} has blocks of {min(sizes)} tokens")


def _check_vocabulary(rows: TrajectoryDataset, settings: Mapping[str, Any], vocab_size: int, vocabulary: str) -> None:
    if settings.get("vocabulary") not in (None, vocabulary):
        raise UsageError(
            f"the trajectories were made with the tokenizer of {settings.get('model')}, whose token ids mean other texts than "
            "those of the model that is trained; collect them with that model"
        )
    stored = settings.get("vocab_size")
    if stored is not None and stored != vocab_size:
        raise UsageError(
            f"the trajectories were made with a vocabulary of {stored} tokens, the model has {vocab_size}; "
            "collect them with the model that is trained"
        )
    if stored is None:
        largest = max(max(row.prompt_ids + row.response_ids) for row in rows)
        if largest >= vocab_size:
            raise UsageError(f"the trajectories hold token id {largest}, but the model's vocabulary has {vocab_size} tokens")
