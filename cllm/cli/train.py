"""``cllm train`` and ``cllm/train_cllm.sh``: fine-tune a target model into a CLLM, or train a consistency adapter for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cllm.cli.command import Parser, command

if TYPE_CHECKING:
    from cllm.training.build import TrainingInputs


@dataclass
class Objective:
    """What is trained."""

    lossless: bool = field(
        default=False,
        metadata={
            "help": "train a consistency adapter, which drafts while the target model, unchanged, decides the text; other options "
            "then: --lossless --help"
        },
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    inputs, args, parts = arguments(sys.argv[1:] if argv is None else argv, "cllm train")
    from cllm.training.arguments import LosslessTrainingArguments
    from cllm.training.build import train

    train(inputs, args, **parts)
    if args.process_index == 0:
        print(f"{'consistency adapter' if isinstance(args, LosslessTrainingArguments) else 'CLLM'} saved in {args.output_dir}")


def arguments(words: Sequence[str], prog: str) -> tuple[TrainingInputs, Any, dict[str, Any]]:
    """What :func:`cllm.training.build.train` takes: its two arguments, and the others by name."""
    from transformers.hf_argparser import string_to_bool

    from cllm.cli.training import parse
    from cllm.training.arguments import CllmTrainingArguments, LosslessTrainingArguments
    from cllm.training.build import TrainingInputs
    from cllm.training.lora import AdapterArguments, LoraArguments
    from cllm.training.probing import CollapseArguments, ProbeArguments

    early = Parser(prog=prog, add_help=False, allow_abbrev=False)
    early.add_argument("--lossless", nargs="?", type=string_to_bool, const=True)
    kinds: tuple[Any, ...] = (LoraArguments, CollapseArguments, CllmTrainingArguments)
    if early.parse_known_args(words)[0].lossless:
        kinds = (AdapterArguments, ProbeArguments, LosslessTrainingArguments)
    inputs, _, lora, probe, args = parse(words, prog, __doc__, TrainingInputs, Objective, *kinds)
    return inputs, args, {"lora": lora, "probe": probe}
