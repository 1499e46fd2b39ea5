"""What the commands that train share: options from dataclasses, and a run that can be resumed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.cli.command import Parser
from cllm.errors import UsageError, check_minimums
from cllm.files import numbered_folders

if TYPE_CHECKING:
    from cllm.training.lora import AdapterArguments

logger = logging.getLogger(__name__)

AT_LEAST = {
    "learning_rate": 0,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
}  # what transformers itself refuses late and with a traceback, if at all


def parse(words: Sequence[str], prog: str, description: str | None, *types: Any) -> tuple[Any, ...]:
    """One object per dataclass, the training arguments last. Raises UsageError for what they do not allow."""
    from transformers import HfArgumentParser

    class TrainParser(Parser, HfArgumentParser):
        """All fields of the dataclasses as options, errors in one line."""

    parser = TrainParser(types, prog=prog, description=description)
    parser.set_defaults(disable_tqdm=False)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error).strip()) from error
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for name, value in vars(parsed[-1]).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} must be a finite number, got {value}")
    check_minimums(parsed[-1], AT_LEAST)
    return tuple(parsed)


def data_seed(args: Any) -> int:
    """Of what is drawn from the data."""
    return args.seed if args.data_seed is None else args.data_seed


def make_trainer(kind: Any, args: Any, **parts: Any) -> Any:
    """A trainer; what its options do not allow is a UsageError. One process trains on one GPU, whatever else is there."""
    if args.n_gpu > 1:
        logger.warning("training on one of %d GPUs; NUM_PROCESSES and train_cllm.sh use more", args.n_gpu)
        args._n_gpu = 1  # else the parent would take torch's DataParallel, with all losses on the first
    try:
        return kind(args=args, **parts)
    except (ValueError, ImportError) as error:  # options that do not go together
        raise UsageError(str(error).strip()) from error
    except OSError as error:
        raise UsageError(f"cannot write to {args.output_dir}: {error.strerror}") from error


def open_weights(path: str, **how: Any) -> Any:
    """The model to train, from :func:`cllm.models.load_model`. Raises UsageError for one with a consistency adapter."""
    from cllm.adapter import attached
    from cllm.models import load_model, read_record

    model = load_model(path, **how)
    if attached(model) is not None:
        target = read_record(model.config).get("target_model")
        raise UsageError(f"{path} holds a consistency adapter, which is not trained on; pass its target model, {target}")
    return model


@contextmanager
def whole_weights(args: Any) -> Iterator[None]:
    """Models loaded in here have all their weights, where DeepSpeed ZeRO-3 would give each process a part."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed_plugin is not None:
            args.deepspeed_plugin.set_deepspeed_weakref()


def checkpoint(args: Any) -> str | None:
    """``--resume_from_checkpoint``: a folder, or ``True`` for the last one in the output folder, if there is one.

    ``trainer_state.json`` is written last; a checkpoint without a whole one was torn by a kill or a full disk.
    """
    wanted = args.resume_from_checkpoint
    if wanted in (None, "False", "false"):
        return None
    if wanted not in ("True", "true"):
        if not _is_whole(Path(wanted)):
            raise UsageError(f"resume_from_checkpoint must be a whole checkpoint of a training run or True, got {wanted}")
        return wanted
    whole = [folder for folder in numbered_folders(args.output_dir, "checkpoint").values() if _is_whole(folder)]
    return str(whole[-1]) if whole else None


def _is_whole(folder: Path) -> bool:
    try:
        return "global_step" in json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:  # it may be whole, and what is older must not take its place
        raise UsageError(f"cannot read {folder}: {error.strerror}") from error


def train(trainer: Any, resume_from: str | None, made: str, lora: AdapterArguments, dtype: str) -> None:
    """Train, save, and say what was ``made``. Raises UsageError for a full disk."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from cllm.training.lora import merge_saved_adapter, remove_adapter

    args = trainer.args
    try:
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model()
        trainer.save_state()
        unset_hf_deepspeed_config()  # of what is loaded from here on, the main process has all weights
        if not trainer.is_world_process_zero():
            return
        if lora.lora_r:
            merge_saved_adapter(args.output_dir, lora, dtype)
        else:
            remove_adapter(args.output_dir)
    except Exception as error:
        if _disk_full(error):
            raise UsageError(f"cannot write to {args.output_dir}: no space left on the disk") from error
        raise
    print(f"{made} saved in {args.output_dir}")


def _disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is a full disk, in the words of safetensors and ``torch.save``."""
    signs = ("No space left on device", "Disk quota exceeded", "file write failed", "iostream error")
    return error is not None and (any(sign in str(error) for sign in signs) or _disk_full(error.__context__))
