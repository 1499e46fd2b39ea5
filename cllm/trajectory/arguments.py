"""The options of a collection. This module imports no torch, so ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass

from cllm.errors import UsageError
from cllm.options import KEY, Engine, ModelOptions, Options, PrefixOptions, Start, TaskOptions, option

FOLDER = "collected_jacobi_trajectory"  # where the default output folders lie


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Options):
    """Who writes a model's responses. Raises UsageError for two sources at once."""

    engine: Engine = option("who writes the model's responses; vllm has to be installed", "cllm")
    base_url: str | None = option(
        "take the responses from a server of the same model, up to /v1, which knows return_token_ids as vLLM's does; a key is "
        f"read from ${KEY}",
        None,
        metavar="URL",
    )
    responses: str | None = option(
        "take the responses from JSONL: prompt_token_ids, prompt or messages, and token_ids or response; what is not the model's "
        "own greedy text is counted",
        None,
        metavar="FILE",
    )
    tensor_parallel_size: int = option("GPUs that share the model with --engine vllm", 1, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum((self.engine == "vllm", self.base_url is not None, self.responses is not None)) > 1:
            raise UsageError("responses have one source: --engine vllm, --base_url or --responses; leave out the others")
        if self.tensor_parallel_size > 1 and self.engine != "vllm":
            raise UsageError("--tensor_parallel_size is an option of --engine vllm")


@dataclass(frozen=True, kw_only=True)
class CollectArguments(SourceOptions, PrefixOptions, ModelOptions, TaskOptions):
    """The options of :func:`cllm.trajectory.collection.collect`. Raises UsageError for values that are out of range."""

    block_size: int = option("block size n", 16, flag="--max_new_tokens", least=1)
    max_new_seq_len: int = option("longest response, in tokens", 512)
    guess: Start = option(
        "what blocks start from: random tokens of the context (the paper), random tokens of the vocabulary, or the "
        "same token everywhere. The CLLM then decodes with the same",
        "context",
    )
    use_aug: bool = option("add states with some wrong guesses set right", False)
    responses_only: bool = option("store no trajectories, which `cllm train --lossless` does not use; quicker", False)
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
