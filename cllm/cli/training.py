"""The options of the commands that train: those of ``transformers.TrainingArguments`` and more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cllm.cli.command import Parser
from cllm.errors import UsageError, check_minimums

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
