"""The options of the measurements. This module imports no torch, so ``--help`` stays fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cllm.evaluation.method_name import Baseline
from cllm.options import AUTO, GUESS_HELP, DecodingOptions, ModelOptions, PrefixOptions, SamplingOptions, TaskOptions, option


@dataclass(frozen=True, kw_only=True)
class SpeedArguments(PrefixOptions, ModelOptions, TaskOptions):
    """The options of :func:`cllm.evaluation.speed_run.measure_speed`. Raises UsageError for a value that is out of range."""

    model: str = field(metadata={"help": "checkpoint folder or hub name", "flag": "--test_model", "metavar": "PATH"})
    block_size: int | None = option("block size; default: the checkpoint's own, else 16", None, flag="--max_new_tokens", least=1)
    drafts: int | None = option("draft tokens of a consistency adapter; default: what `cllm tune` stored, else one less", None)
    filename: str | None = option("rows to take prompts from; default: ./test.jsonl or ./test.jsonl.gz if there, else the hub", None)
    data_size: int | None = option("prompts at most", 500, least=1)
    max_new_seq_len: int = option("new tokens per response at most", 512, least=1)
    batch_size: int = option("prompts decoded together", 1, least=1)
    baseline: Sequence[Baseline] = option(
        "more to compare with, may be repeated; no_adapter: the same window without the model's consistency adapter; "
        "generate and prompt_lookup are Hugging Face's; ar is always there",
        (),
        action="extend",
    )
    window: Literal["sliding", "block"] = option("block: the paper's procedure", "sliding")
    guess: Sequence[str] = option(f"{GUESS_HELP}; each of several is measured as a method of its own", (), metavar="NAME")
    target_model: str | None = option("the model before training: adds its text's quality, side by side", None, metavar="PATH")
    explain: bool = option("say in figures why the speedup is less than the tokens per forward, and what looks like a fault", False)
    seed: int = option("of the fresh guesses and of the bootstrap", 0)


@dataclass(frozen=True, kw_only=True)
class AccuracyArguments(SamplingOptions, DecodingOptions, ModelOptions, TaskOptions):
    """The options of :func:`cllm.evaluation.accuracy_run.measure_accuracy`. Raises UsageError for a value that is out of range."""

    model: str = option("checkpoint folder or hub name", "", flag="--model_dir", metavar="PATH")
    use_consistency_decoding: bool = option("Jacobi decoding; without it, autoregressive decoding", False)
    block_size: int | None = option(
        "block size; default: the checkpoint's own, else 16", None, flag="--max_new_tokens_for_consistency", least=1
    )
    max_tokens: int = option("new tokens per reply at most", 1024, least=1)
    prompt_type: Literal["math-single"] | None = option(
        "the task's plain text prompt (Question: ... Answer: Let's think step by step.) instead of the tokenizer's chat "
        "template. --prompt_template and the template that a CLLM was trained with take precedence",
        None,
    )
    dev_set: str = option("only rows with this `source`, upper or lower case; all for every row", "all")
    filename: str | None = option(
        "rows to answer; default: ./test.jsonl or ./test.jsonl.gz if there, else the task's own test rows: those of the "
        "hub, or of an installed package",
        None,
    )
    data_size: int | None = option("questions at most", None, least=1)
    batch_size: int = option("questions answered together", 8, least=1)
    seed: int = option("of the draws, the fresh guesses and the bootstrap", 0)
    output_file_name: str | None = option("JSONL file of answers; default: cllm_generated_TASK.jsonl", None)
    resume: bool = option("keep the answers of an earlier run", True)
    eval_only: bool = option("score the answers there are; needs no --model_dir", False)
    results: str | None = option("JSON file of scores; default: OUTPUT_FILE_NAME's name with .accuracy.json", None)
    export: str | None = option(
        "the answers in the format of the dataset's own tools, if it has one; default: OUTPUT_FILE_NAME's name with .export.jsonl",
        None,
        metavar="FILE",
    )

    @property
    def answers_file(self) -> Path:
        return Path(self.output_file_name or f"cllm_generated_{self.task}.jsonl")

    @property
    def scores_file(self) -> Path:
        return Path(self.results or self.answers_file.with_suffix(".accuracy.json"))

    @property
    def export_file(self) -> Path:
        return Path(self.export or self.answers_file.with_suffix(".export.jsonl"))


@dataclass(frozen=True, kw_only=True)
class TuneArguments(ModelOptions, TaskOptions):
    """The options of :func:`cllm.evaluation.tune.tune`. Raises UsageError for a value that is out of range."""

    filename: str | None = option("rows to take sample prompts from; default: ./test.jsonl if there, else the hub's test split", None)
    data_size: int | None = option("sample prompts", 16, least=1)
    max_new_seq_len: int = option("new tokens per sample response at most", 64, least=1)
    widths: Sequence[int] = option("widths to measure; default: 1 to 32, or 12 with an adapter", (), least=1)
    drafts: Sequence[int] = option(
        "draft tokens to measure with each width, where the model has a consistency adapter; default: 2 * width - 2",
        (),
        least=1,
    )
    guess: Sequence[str] = option(
        "fresh guesses to measure, named as for `cllm speedup`; auto: those that --guess auto chooses from everywhere",
        (AUTO,),
        metavar="NAME",
    )
    batch_size: Sequence[int] = option("batch sizes to measure", (1,), least=1)
    seed: int = option("of the fresh guesses", 0)
    save: bool = option("store the best width and guess at the first batch size in the checkpoint's config.json", False)
