"""``cllm sft``: fine-tune a general model on a task's answers, which gives the target model to collect from."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cllm.cli.command import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    from transformers import TrainingArguments

    from cllm.cli.training import parse
    from cllm.training.lora import LoraArguments
    from cllm.training.sft import FineTuningInputs, fine_tune

    words = sys.argv[1:] if argv is None else argv
    inputs, lora, args = parse(words, "cllm sft", __doc__, FineTuningInputs, LoraArguments, TrainingArguments)
    fine_tune(inputs, args, lora)
    if args.process_index == 0:
        print(f"target model saved in {args.output_dir}")
