"""``cllm train`` and ``cllm/train_cllm.sh``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cllm.cli.command import command
from cllm.cli.probe import ProbeArguments, watch
from cllm.cli.training import checkpoint, make_trainer, parse, train, whole_weights
from cllm.errors import UsageError

if TYPE_CHECKING:
    from cllm.training.lora import LoraArguments


@dataclass
class RunArguments:
    """What to train from."""

    model: str = field(metadata={"help": "the target model: checkpoint folder or hub name"})
    trajectories: str = field(
        metadata={"help": "a folder that `cllm collect` wrote, a published JSON file, or a hub name of either"}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "block size n; default: the one the trajectories were collected with"}
    )
    dtype: str = field(
        default="float32", metadata={"help": "of the weights in training; use --bf16 for mixed precision on a GPU"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager or flex_attention (on a GPU); default: the model's own"}
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    from cllm.serving.export import equip

    run, lora, probe, args = arguments(sys.argv[1:] if argv is None else argv, "cllm train")
    resume_from = checkpoint(args)
    trainer = build_trainer(run, lora, probe, args)
    train(trainer, resume_from, "CLLM", lora, run.dtype)
    if trainer.is_world_process_zero() and not (lora.lora_r and not lora.merge_lora):
        equip(args.output_dir)


def arguments(words: Sequence[str], prog: str) -> tuple[Any, ...]:
    """All that :func:`build_trainer` takes."""
    from cllm.training.arguments import CllmTrainingArguments
    from cllm.training.lora import LoraArguments

    return parse(words, prog, __doc__, RunArguments, LoraArguments, ProbeArguments, CllmTrainingArguments)


def build_trainer(run: RunArguments, lora: LoraArguments, probe: ProbeArguments, args):
    """Load everything, check that it fits together, and give the trainer. Raises UsageError where it does not."""
    from cllm.attention import TRAINABLE, check_model
    from cllm.models import (
        DEFAULT_GUESS,
        TRAINED_GUESS,
        load_model,
        load_tokenizer,
        stop_token_ids,
        vocabulary_stamp,
        write_record,
    )
    from cllm.training.arguments import OBJECTIVE
    from cllm.training.examples import Collator, ExampleDataset
    from cllm.training.lora import adapt
    from cllm.training.trainer import CllmTrainer
    from cllm.trajectory.store import TrajectoryDataset

    tokenizer = load_tokenizer(run.model)
    how = {"dtype": run.dtype, "attn_implementation": run.attn_implementation, **lora.loading(str(args.device))}
    model = load_model(run.model, **how)
    check_model(model, TRAINABLE)
    rows = TrajectoryDataset(run.trajectories, eos_ids=stop_token_ids(model, tokenizer))
    settings = rows.settings or {}
    block_size = _block_size(run, settings, rows)
    _check_vocabulary(rows, settings, model.config.get_text_config(decoder=True).vocab_size, vocabulary_stamp(tokenizer))
    frozen = args.needs_target and not lora.lora_r  # adapters that are off give the target model again
    with whole_weights(args):
        target = load_model(run.model, **how) if frozen or probe.probe_prompts else None
    dataset = ExampleDataset(rows, args.sampling, seed=args.seed if args.data_seed is None else args.data_seed)
    write_record(
        model.config,
        {
            "block_size": block_size,
            "prompt_template": settings.get("prompt_template"),
            "task": settings.get("task"),
            "target_model": run.model,
            "responses": len(rows),
            TRAINED_GUESS: settings.get("guess", DEFAULT_GUESS),
        }
        | {name: getattr(args, name) for name in OBJECTIVE}
        | lora.record(),
    )
    trainer = make_trainer(
        CllmTrainer,
        args,
        model=adapt(model, lora, args.seed),
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id, args.distance_decay, args.max_row_tokens),
        processing_class=tokenizer,
        target_model=target if frozen else None,
    )
    if probe.probe_prompts:
        watch(trainer, probe, target)
    return trainer


def _block_size(run: RunArguments, settings: dict, rows) -> int:
    stored = settings.get("block_size")
    if run.block_size is not None and run.block_size < 1:
        raise UsageError(f"block_size must be >= 1, got {run.block_size}")
    if stored is not None and run.block_size not in (None, stored):
        raise UsageError(f"block_size is {run.block_size}, but {run.trajectories} was collected with {stored}")
    size = stored or run.block_size
    if size is None:
        raise UsageError(f"{run.trajectories} does not say its block size; pass --block_size")
    if stored is None:  # a published file: every block but a response's last one is full
        sizes = {end - start for row in rows for start, end in row.spans()[:-1]} - {run.block_size}
        if sizes:
            raise UsageError(f"block_size is {run.block_size}, but {run.trajectories} has blocks of {min(sizes)} tokens")
    return size


def _check_vocabulary(rows, settings: dict, vocab_size: int, vocabulary: str) -> None:
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
