"""The options of ``cllm make``. This module imports no torch, so ``--help`` stays fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cllm.errors import UsageError
from cllm.files import StrPath
from cllm.options import LOSSLESS_BLOCK, ModelOptions, Start, option
from cllm.trajectory.arguments import SourceOptions


@dataclass(frozen=True, kw_only=True)
class MakeArguments(SourceOptions, ModelOptions):
    """The options of a run. Raises UsageError for a value that is out of range."""

    model: str = field(metadata={"help": "checkpoint folder or hub name", "flag": "model", "metavar": "MODEL"})
    prompts: Sequence[StrPath] = field(
        metadata={
            "help": "files of prompts, mixed: JSONL with prompt or messages, a log of an OpenAI-compatible server, or .txt with a "
            "prompt a line; or TASK or TASK:FILE, a task's data (see `cllm tasks`)",
            "flag": "prompts",
            "metavar": "PROMPTS",
        }
    )
    output: Path = field(metadata={"help": "folder to write: new, empty, or that of an earlier run", "flag": "output", "metavar": "OUTPUT"})
    held_out: Sequence[StrPath] = option(
        "what is measured on; default: a fifth of the prompts, 64 at most, which are then not learned from", (), metavar="PROMPTS"
    )
    minutes: float | None = option("about how long it may take; default: as long as all prompts need", None)
    max_new_seq_len: int = option("longest response, in tokens", 128)
    guess: Start = option("what windows start from; SGLang's UNO needs uniform (cllm export)", "context")
    dry_run: bool = option("stop when the plan is made, and print it", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"minutes must be a number above 0, got {self.minutes}")
        if self.max_new_seq_len < LOSSLESS_BLOCK:
            raise UsageError(f"max_new_seq_len must be >= {LOSSLESS_BLOCK}, got {self.max_new_seq_len}")
        if not self.prompts:
            raise UsageError("no prompts; pass at least one file, task or TASK:FILE")
