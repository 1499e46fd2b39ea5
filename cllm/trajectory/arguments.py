"""What a collection is given. This module imports no torch, so ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass

from cllm.errors import UsageError
from cllm.options import ModelOptions, PrefixOptions, Start, TaskOptions, option

FOLDER = "collected_jacobi_trajectory"  # where the default output folders lie


@dataclass(frozen=True, kw_only=True)
class CollectArguments(PrefixOptions, ModelOptions, TaskOptions):
    """What :func:`cllm.trajectory.collection.collect` is given. Raises UsageError for values that are out of range."""

    block_size: int = option("block size n", 16, flag="--max_new_tokens", least=1)
    max_new_seq_len: int = option("longest response, in tokens", 512)
    guess: Start = option(
        "what trajectories start from: random tokens of the context (the paper), random tokens of the vocabulary, or the "
        "same token everywhere. The CLLM then decodes with the same",
        "context",
    )
    use_aug: bool = option("add states with some wrong guesses set right", False)
    responses_only: bool = option("store no trajectories: enough for `cllm train --lossless`, and quicker", False)
    use_labels: bool = option("store the dataset's own answers as well", False)
    data_size: int | None = option("use only the first so many examples", None, least=1)
    batch_size: int = option("prompts decoded together", 16, least=1)
    output: str | None = option(
        f"folder to write; default: one named after the settings in {FOLDER}/ of the folder this is run in, or of its "
        "data/ where that has the scripts",
        None,
    )
    published: str | None = option("also write the paper's JSON form; blocks then start at 0", None, metavar="FILE")
    seed: int = option("of starting guesses and block boundaries", 0)
    resume: bool = option("go on with what the folder holds", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.responses_only and self.published:
            raise UsageError("--published writes trajectories, and --responses_only stores none; leave out one of them")
