"""Where models live in a training run of several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


@contextmanager
def unsharded(args: TrainingArguments) -> Iterator[None]:
    """Models made inside are whole on every process, even where DeepSpeed ZeRO-3 shards whatever is loaded."""
    if args.deepspeed_plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.deepspeed_plugin.dschf)
