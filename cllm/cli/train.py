"""``cllm train`` and ``cllm/train_cllm.sh``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cllm.cli.command import Parser, command
from cllm.cli.probe import CollapseArguments, ProbeArguments, watch
from cllm.cli.training import checkpoint, data_seed, make_trainer, open_weights, parse, train, whole_weights
from cllm.errors import UsageError

if TYPE_CHECKING:
    from cllm.training.lora import AdapterArguments


@dataclass
class RunArguments:
    """What to train from."""

    model: str = field(metadata={"help": "the target model: checkpoint folder or hub name"})
    trajectories: str = field(metadata={"help": "a folder that `cllm collect` wrote, a published JSON file, or a hub name of either"})
    block_size: int | None = field(default=None, metadata={"help": "block size n; default: the one the trajectories were collected with"})
    dtype: str = field(default="float32", metadata={"help": "of the weights in training; use --bf16 for mixed precision on a GPU"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager or flex_attention (on a GPU); default: the model's own"}
    )
    lossless: bool = field(
        default=False,
        metadata={
            "help": "train a consistency adapter, which drafts while the target model, unchanged, decides the text; other "
            "options then: --lossless --help"
        },
    )


@dataclass(frozen=True)
class Source:
    """What a run trains from, checked to fit together."""

    tokenizer: Any
    model: Any
    rows: Any
    settings: dict[str, Any]  # of the collection
    record: dict[str, Any]  # what every objective's record says
    how: dict[str, Any]  # the model is loaded


@command
def main(argv: Sequence[str] | None = None) -> None:
    run(sys.argv[1:] if argv is None else argv, "cllm train")


def run(words: Sequence[str], prog: str) -> None:
    """Train as the options say."""
    from cllm.serving.export import equip

    what, lora, probe, args = arguments(words, prog)
    resume_from = checkpoint(args)
    trainer = build_trainer(what, lora, probe, args)
    train(trainer, resume_from, "consistency adapter" if what.lossless else "CLLM", lora, what.dtype)
    if trainer.is_world_process_zero() and (lora.merged or not lora.lora_r):
        equip(args.output_dir)


def arguments(words: Sequence[str], prog: str) -> tuple[Any, ...]:
    """All that :func:`build_trainer` takes."""
    from transformers.hf_argparser import string_to_bool

    from cllm.training.arguments import CllmTrainingArguments, LosslessTrainingArguments
    from cllm.training.lora import AdapterArguments, LoraArguments

    early = Parser(prog=prog, add_help=False, allow_abbrev=False)
    early.add_argument("--lossless", nargs="?", type=string_to_bool, const=True)
    kinds: tuple[Any, ...] = (LoraArguments, CollapseArguments, CllmTrainingArguments)
    if early.parse_known_args(words)[0].lossless:
        kinds = (AdapterArguments, ProbeArguments, LosslessTrainingArguments)
    return parse(words, prog, __doc__, RunArguments, *kinds)


def build_trainer(run: RunArguments, lora: AdapterArguments, probe: Any, args):
    """Load everything, check that it fits together, and give the trainer. Raises UsageError where it does not."""
    source = _open(run, lora, args)
    if run.lossless:
        from cllm.cli.lossless import lossless_trainer

        return lossless_trainer(source, lora, probe, args)
    return _cllm_trainer(source, run, lora, probe, args)


def _open(run: RunArguments, lora: AdapterArguments, args) -> Source:
    from cllm.attention import MASKABLE, TRAINABLE, check_model
    from cllm.models import DEFAULT_GUESS, TRAINED_GUESS, load_tokenizer, stop_token_ids, vocabulary_stamp
    from cllm.trajectory.store import TrajectoryDataset

    tokenizer = load_tokenizer(run.model)
    how = {"dtype": run.dtype, "attn_implementation": run.attn_implementation, **lora.load_options(str(args.device))}
    model = open_weights(run.model, **how)
    check_model(model, MASKABLE if run.lossless else TRAINABLE)
    rows = TrajectoryDataset(run.trajectories, eos_ids=stop_token_ids(model, tokenizer))
    settings = rows.settings or {}
    block_size = _block_size(run, settings, rows)
    _check_vocabulary(rows, settings, model.config.get_text_config(decoder=True).vocab_size, vocabulary_stamp(tokenizer))
    record = {
        "block_size": block_size,
        "prompt_template": settings.get("prompt_template"),
        "task": settings.get("task"),
        "target_model": run.model,
        "responses": len(rows),
        TRAINED_GUESS: settings.get("guess", DEFAULT_GUESS),
    }
    return Source(tokenizer, model, rows, settings, record, how)


def _cllm_trainer(source: Source, run: RunArguments, lora: AdapterArguments, probe: CollapseArguments, args):
    from cllm.models import load_model, packed_length, write_record
    from cllm.training.arguments import OBJECTIVE_FIELDS
    from cllm.training.examples import Collator, ExampleDataset
    from cllm.training.lora import add_adapter
    from cllm.training.trainer import CllmTrainer

    if source.settings.get("responses_only"):
        raise UsageError(f"{run.trajectories} was collected with --responses_only, which is enough for --lossless alone")
    model, rows, tokenizer = source.model, source.rows, source.tokenizer
    frozen = args.needs_target and not lora.lora_r  # adapters that are off give the target model again
    with whole_weights(args):
        target = load_model(run.model, **source.how) if frozen or probe.probe_prompts else None
    dataset = ExampleDataset(rows, args.state_sampling, data_seed(args), packed_length(model.config))
    write_record(model.config, source.record | {name: getattr(args, name) for name in OBJECTIVE_FIELDS} | lora.record())
    trainer = make_trainer(
        CllmTrainer,
        args,
        model=add_adapter(model, lora, args.seed),
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id, args.distance_decay, args.max_row_tokens),
        processing_class=tokenizer,
        target_model=target if frozen else None,
    )
    if probe.probe_prompts:
        watch(trainer, probe, target)
    return trainer


def _block_size(run: RunArguments, settings: dict, rows) -> int:
    stored = settings.get("block_size")
    if run.block_size is not None and run.block_size < 1:
        raise UsageError(f"block_size must be >= 1, got {run.block_size}")
    if stored is not None and run.block_size not in (None, stored):
        raise UsageError(f"block_size is {run.block_size}, but {run.trajectories} was collected with {stored}")
    size = stored or run.block_size
    if size is None:
        raise UsageError(f"{run.trajectories} does not say its block size; pass --block_size")
    if stored is None:  # a published file: every block but a response's last one is full
        sizes = {end - start for row in rows for start, end in row.spans()[:-1]} - {run.block_size}
        if sizes:
            raise UsageError(f"block_size is {run.block_size}, but {run.trajectories} has blocks of {min(sizes)} tokens")
    return size


def _check_vocabulary(rows, settings: dict, vocab_size: int, vocabulary: str) -> None:
    if settings.get("vocabulary") not in (None, vocabulary):
        raise UsageError(
            f"the trajectories were made with the tokenizer of {settings.get('model')}, whose token ids mean other texts than "
            "those of the model that is trained; collect them with that model"
        )
    stored = settings.get("vocab_size")
    if stored is not None and stored != vocab_size:
        raise UsageError(
            f"the trajectories were made with a vocabulary of {stored} tokens, the model has {vocab_size}; "
            "collect them with the model that is trained"
        )
    if stored is None:
        largest = max(max(row.prompt_ids + row.response_ids) for row in rows)
        if largest >= vocab_size:
            raise UsageError(f"the trajectories hold token id {largest}, but the model's vocabulary has {vocab_size} tokens")
