"""The window, the draft and the fresh guesses that are fastest on this device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cllm.adapter import attached
from cllm.errors import UsageError
from cllm.evaluation.arguments import TuneArguments
from cllm.evaluation.choice import CANDIDATES, Choice, fastest, lossless_candidates, measure_choices
from cllm.evaluation.environment import environment
from cllm.evaluation.guess import check_guess
from cllm.evaluation.prompt import default_file, encode
from cllm.evaluation.table import format_table, number
from cllm.models import context_length, store_choice
from cllm.open_model import OpenModel, open_model
from cllm.options import AUTO
from cllm.tasks.base import Task
from cllm.tasks.configure import configured_task
from cllm.tasks.source import load_examples

WIDTHS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
LOSSLESS_WIDTHS = (1, 2, 4, 6, 8, 12)  # of a model with a consistency adapter


def tune(args: TuneArguments) -> dict[str, Any]:
    """Measure what an iteration costs and gains with every width and guess on this device.

    Returns JSON values: ``settings``, ``environment``, all ``choices`` (:class:`cllm.evaluation.choice.Choice`) and for each
    batch size the ``best`` of them, by tokens per second. With ``args.save`` the best one at the first batch size is stored in
    the checkpoint, whose decoders use it from then on. Raises UsageError where model, prompts and options do not fit together.
    """
    for name in args.guess:
        check_guess(name)
    if args.save and not Path(args.model, "config.json").is_file():
        raise UsageError(f"--save needs a local checkpoint, got {args.model!r}")
    task = configured_task(args.task, "tune", filename=args.filename, model=args.model, **args.task_options)
    opened = open_model(args, task.plain_template)
    measured = _measure(args, opened, task)
    best = {size: fastest(measured, size) for size in args.batch_size}
    if args.save:
        first = best[args.batch_size[0]]
        store_choice(args.model, first.width, first.guess, first.drafts)
    given = {name: value for name, value in asdict(args).items() if name != "task_options"}
    return {
        "settings": given | dict(args.task_options),
        "environment": environment(opened.model.device),
        "choices": [asdict(each) for each in measured],
        "best": {size: asdict(each) for size, each in best.items()},
    }


def _measure(args: TuneArguments, opened: OpenModel, task: Task) -> list[Choice]:
    examples = load_examples(task, default_file(args.filename, Path.cwd()), "test", args.data_size)
    prompts, _ = encode(examples, opened.template, opened.tokenizer, context_length(opened.model.config))
    lossless = attached(opened.model) is not None
    guesses = args.guess
    if AUTO in guesses:
        guesses = lossless_candidates(opened.record) if lossless else CANDIDATES
    return measure_choices(
        opened.model,
        [each.ids for each in prompts],
        sorted(set(args.widths or (LOSSLESS_WIDTHS if lossless else WIDTHS))),
        list(dict.fromkeys(guesses)),
        list(dict.fromkeys(args.batch_size)),
        max_new_tokens=args.max_new_seq_len,
        drafts=sorted(set(args.drafts)),
        eos_ids=opened.stops,
        seed=args.seed,
        progress=lambda items: tqdm(items, desc="tune", file=sys.stderr, disable=None),
    )


def render_choices(report: Mapping[str, Any]) -> str:
    """The table for people, the best choice of each batch size marked; one with fewer prompts was slower than others on those."""
    rows = [
        [
            each["guess"],
            str(each["width"]),
            str(each["drafts"]),
            str(each["batch_size"]),
            str(each["batch_size"] * each["batches"]),
            number(1000 * each["seconds"], 1),
            number(each["tokens_per_forward"]),
            number(each["tokens_per_second"], 1) + (" *" if each == report["best"][each["batch_size"]] else "  "),
        ]
        for each in report["choices"]
    ]
    names = ["guess", "width", "drafts", "batch", "prompts"]
    return format_table([*names, "milliseconds\nper iteration", "tokens per\nforward", "tokens/s  "], rows)
