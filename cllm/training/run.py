"""A training run that can be resumed: the model it starts from, its trainer, and the checkpoint it leaves."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from cllm.adapter import attached
from cllm.errors import UsageError
from cllm.files import numbered_folders
from cllm.models import load_model, read_record
from cllm.training.lora import AdapterArguments, merge_saved_adapter, remove_adapter

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ModelLoading:
    """The model to train, and how to load it."""

    model: str = field(metadata={"help": "the model to train: checkpoint folder or hub name"})
    dtype: str = field(default="float32", metadata={"help": "of the weights in training; use --bf16 for mixed precision on a GPU"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager or flex_attention (on a GPU); default: the model's own"}
    )

    def load_options(self) -> dict[str, Any]:
        """Arguments of :func:`open_weights`."""
        return {"dtype": self.dtype, "attn_implementation": self.attn_implementation}


def open_weights(path: str, **how: Any) -> PreTrainedModel:
    """The model to train, from :func:`cllm.models.load_model`. Raises UsageError for one with a consistency adapter."""
    model = load_model(path, **how)
    if attached(model) is not None:
        target = read_record(model.config).get("target_model")
        raise UsageError(f"{path} holds a consistency adapter, which is not trained on; pass its target model, {target}")
    return model


@contextmanager
def whole_weights(args: Any) -> Iterator[None]:
    """Models loaded in here have all their weights, where DeepSpeed ZeRO-3 would give each process a part."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed_plugin is not None:
            args.deepspeed_plugin.set_deepspeed_weakref()


def data_seed(args: TrainingArguments) -> int:
    """The seed of what is drawn from the data."""
    return args.seed if args.data_seed is None else args.data_seed


def make_trainer(kind: Any, args: Any, **parts: Any) -> Any:
    """A trainer of this ``kind``, on one GPU in each process. Raises UsageError for options that it does not allow."""
    if args.n_gpu > 1:
        logger.warning("training on one of %d GPUs; NUM_PROCESSES and train_cllm.sh use more", args.n_gpu)
        args._n_gpu = 1  # else the parent would take torch's DataParallel, with all losses on the first
    try:
        return kind(args=args, **parts)
    except (ValueError, ImportError) as error:  # options that do not go together
        raise UsageError(str(error).strip()) from error
    except OSError as error:
        raise UsageError(f"cannot write to {args.output_dir}: {error.strerror}") from error


def checkpoint(args: TrainingArguments) -> str | None:
    """``resume_from_checkpoint``: a folder, or ``True`` for the last one in the output folder, if there is one.

    ``trainer_state.json`` is written last; a checkpoint without a whole one was torn by a kill or a full disk.
    """
    wanted = str(args.resume_from_checkpoint or "False")
    if wanted in ("False", "false"):
        return None
    if wanted not in ("True", "true"):
        if not _is_whole(Path(wanted)):
            raise UsageError(f"resume_from_checkpoint must be a whole checkpoint of a training run or True, got {wanted}")
        return wanted
    whole = [folder for folder in numbered_folders(str(args.output_dir), "checkpoint").values() if _is_whole(folder)]
    return str(whole[-1]) if whole else None


def _is_whole(folder: Path) -> bool:
    try:
        return "global_step" in json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:  # it may be whole, so an older one must not replace it
        raise UsageError(f"cannot read {folder}: {error.strerror}") from error


def train_and_save(trainer: Trainer, resume_from: str | None, lora: AdapterArguments, dtype: str) -> None:
    """Train, and leave the result in the output folder, with adapters merged or not as ``lora`` says.

    Raises UsageError for a full disk.
    """
    args: Any = trainer.args
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


def _disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is a full disk, in the words of safetensors and ``torch.save``."""
    signs = ("No space left on device", "Disk quota exceeded", "file write failed", "iostream error")
    return error is not None and (any(sign in str(error) for sign in signs) or _disk_full(error.__context__))
