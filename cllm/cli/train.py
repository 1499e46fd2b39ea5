"""``cllm train`` and ``cllm/train_cllm.sh``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.cli.command import Parser, command
from cllm.errors import UsageError

AT_LEAST = {
    "learning_rate": 0,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
}  # what transformers itself refuses late and with a traceback, if at all


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
    run, args = parse(sys.argv[1:] if argv is None else list(argv))
    resume_from = _checkpoint(args)
    trainer = build_trainer(run, args)
    try:
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model()
        trainer.save_state()
    except Exception as error:
        if _disk_full(error):
            raise UsageError(f"cannot write to {args.output_dir}: no space left on the disk") from error
        raise
    if trainer.is_world_process_zero():
        print(f"CLLM saved in {args.output_dir}")


def parse(words: list[str]):
    """The run's own arguments and the training arguments. Raises UsageError for what they do not allow."""
    from transformers import HfArgumentParser

    from cllm.training.arguments import CllmTrainingArguments

    class TrainParser(Parser, HfArgumentParser):
        """All fields of the two dataclasses as options, errors in one line."""

    dataclasses: Any = (RunArguments, CllmTrainingArguments)
    parser = TrainParser(dataclasses, prog="cllm train", description=__doc__)
    parser.set_defaults(disable_tqdm=False)
    try:
        run, args, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error).strip()) from error
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} must be a finite number, got {value}")
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise UsageError(f"{name} must be >= {AT_LEAST[name]}, got {value}")
    return run, args


def build_trainer(run: RunArguments, args):
    """Load everything, check that it fits together, and give the trainer. Raises UsageError where it does not."""
    from cllm.attention import check_model
    from cllm.models import load_model, load_tokenizer, stop_token_ids, write_record
    from cllm.training.examples import Collator, ExampleDataset
    from cllm.training.trainer import CllmTrainer
    from cllm.trajectory.store import TrajectoryDataset

    tokenizer = load_tokenizer(run.model)
    model = load_model(run.model, dtype=run.dtype, device="cpu", attn_implementation=run.attn_implementation)
    check_model(model)
    rows = TrajectoryDataset(run.trajectories, eos_ids=stop_token_ids(model, tokenizer))
    settings = rows.settings or {}
    block_size = _block_size(run, settings, rows)
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
    try:
        return CllmTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=Collator(tokenizer.pad_token_id, args.distance_decay),
            processing_class=tokenizer,
            target_model=target,
        )
    except (ValueError, ImportError) as error:  # options that do not go together
        raise UsageError(str(error).strip()) from error
    except OSError as error:
        raise UsageError(f"cannot write to {args.output_dir}: {error.strerror}") from error


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
    """``--resume_from_checkpoint``: a folder, or ``True`` for the last one in the output folder, if there is one.

    ``trainer_state.json`` is written last; a checkpoint without it was torn by a kill or a full disk.
    """
    wanted = args.resume_from_checkpoint
    if wanted in (None, "False", "false"):
        return None
    if wanted not in ("True", "true"):
        if not Path(wanted, "trainer_state.json").is_file():
            raise UsageError(f"resume_from_checkpoint must be a whole checkpoint of a training run or True, got {wanted}")
        return wanted
    whole = [state.parent for state in Path(args.output_dir).glob("checkpoint-[0-9]*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.partition("-")[2]))) if whole else None


def _disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is a full disk, in the words of safetensors and ``torch.save``."""
    signs = ("No space left on device", "Disk quota exceeded", "file write failed", "iostream error")
    return error is not None and (any(sign in str(error) for sign in signs) or _disk_full(error.__context__))
