"""``cllm train`` and ``cllm/train_cllm.sh``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cllm.cli.command import command
from cllm.errors import UsageError


@dataclass
class RunArguments:
    """What to train from."""

    model: str = field(metadata={"help": "the target model: checkpoint folder or hub name"})
    trajectories: str = field(metadata={"help": "a folder that `cllm collect` wrote, or a published JSON file"})
    block_size: int | None = field(
        default=None, metadata={"help": "block size n; default: the one the trajectories were collected with"}
    )
    dtype: str = field(
        default="float32", metadata={"help": "of the weights in training; use --bf16 for mixed precision on a GPU"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa or eager; default: the model's own"})


@command
def main(argv: Sequence[str] | None = None) -> None:
    from transformers import HfArgumentParser

    from cllm.training.arguments import CllmTrainingArguments

    parser = HfArgumentParser((RunArguments, CllmTrainingArguments), prog="cllm train", description=__doc__)
    run, args = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else list(argv))
    trainer = build_trainer(run, args)
    trainer.train(resume_from_checkpoint=_checkpoint(args))
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"CLLM saved in {args.output_dir}")


def build_trainer(run: RunArguments, args):
    """Load everything, check that it fits together, and give the trainer. Raises UsageError where it does not."""
    from cllm.models import load_model, load_tokenizer, stop_token_ids, write_record
    from cllm.training.examples import Collator, ExampleDataset
    from cllm.training.trainer import CllmTrainer
    from cllm.trajectory.store import TrajectoryDataset

    tokenizer = load_tokenizer(run.model)
    model = load_model(run.model, dtype=run.dtype, device="cpu", attn_implementation=run.attn_implementation)
    rows = TrajectoryDataset(run.trajectories, eos_ids=stop_token_ids(model, tokenizer))
    settings = rows.settings or {}
    block_size = _block_size(run, settings)
    _check_vocabulary(rows, settings, model.config.get_text_config(decoder=True).vocab_size)
    target = None
    if args.needs_target:
        target = load_model(run.model, dtype=run.dtype, device="cpu", attn_implementation=run.attn_implementation)
    dataset = ExampleDataset(rows, args.sampling, seed=args.seed if args.data_seed is None else args.data_seed)
    write_record(
        model.config,
        {
            "block_size": block_size,
            "prompt_template": settings.get("prompt_template"),
            "task": settings.get("task"),
            "target_model": run.model,
            "responses": len(rows),
            "consistency": args.consistency,
            "states_per_block": args.states_per_block,
            "teacher": args.teacher,
            "ar_loss": args.ar_loss,
            "ar_weight": args.ar_weight,
            "distance_decay": args.distance_decay,
        },
    )
    return CllmTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id, args.distance_decay),
        processing_class=tokenizer,
        target_model=target,
    )


def _block_size(run: RunArguments, settings: dict) -> int:
    stored = settings.get("block_size")
    if run.block_size is not None and run.block_size < 1:
        raise UsageError(f"block_size must be >= 1, got {run.block_size}")
    if stored is not None and run.block_size not in (None, stored):
        raise UsageError(f"block_size is {run.block_size}, but {run.trajectories} was collected with {stored}")
    if stored is None and run.block_size is None:
        raise UsageError(f"{run.trajectories} does not say its block size; pass --block_size")
    return stored or run.block_size


def _check_vocabulary(rows, settings: dict, vocab_size: int) -> None:
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


def _checkpoint(args) -> str | None:
    """``--resume_from_checkpoint``: a folder, or ``True`` for the last one in the output folder, if there is one."""
    wanted = args.resume_from_checkpoint
    if wanted in (None, "False", "false"):
        return None
    if wanted not in ("True", "true"):
        if not Path(wanted).is_dir():
            raise UsageError(f"no checkpoint folder {wanted}")
        return wanted
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
