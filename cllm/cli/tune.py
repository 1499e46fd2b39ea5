"""``cllm tune``: find the window, the draft and the fresh guesses that are fastest on this device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.cli.command import AUTO, add_model_options, add_task_option, command, parser, positive
from cllm.errors import UsageError

if TYPE_CHECKING:
    from cllm.cli.model import OpenModel
    from cllm.evaluation.choice import Choice

WIDTHS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
LOSSLESS_WIDTHS, DRAFTS = (1, 4, 6, 8, 12), (7, 11, 15, 23)  # of a model with a consistency adapter


def options(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    result = parser(
        "Measure what an iteration costs and gains with every width and guess on this device, and name the fastest.",
        "cllm tune",
    )
    add_task_option(result, None, "tune", argv)
    add_model_options(result, "--model")
    result.add_argument("--filename", help="rows to take sample prompts from; default: the hub's test split")
    result.add_argument("--data_size", type=positive, default=16, help="sample prompts")
    result.add_argument("--max_new_seq_len", type=positive, default=64, help="new tokens per sample response at most")
    result.add_argument("--widths", type=positive, nargs="+", help="widths to measure; default: 1 to 32, or 12 with an adapter")
    result.add_argument(
        "--drafts",
        type=positive,
        nargs="+",
        default=DRAFTS,
        help="draft tokens to measure for each width, where the model has a consistency adapter",
    )
    result.add_argument(
        "--guess",
        metavar="NAME",
        nargs="+",
        default=[AUTO],
        help="fresh guesses to measure, named as for `cllm speedup`; auto: those that --guess auto chooses from everywhere",
    )
    result.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="batch sizes to measure")
    result.add_argument("--seed", type=int, default=0, help="of the fresh guesses")
    result.add_argument("--output", default="tune.json", help="where the results go")
    result.add_argument(
        "--save",
        action="store_true",
        help="store the best width and guess at the first batch size in the checkpoint's config.json",
    )
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv).parse_args(argv)
    measured, best = run(args)
    print(render(measured, best))
    if args.save:
        first = best[args.batch_size[0]]
        drafts = f", {first.drafts} draft tokens" * (first.drafts > 0)
        print(f"Width {first.width}{drafts} and guess {first.guess} stored in {Path(args.model, 'config.json')}")
    print(f"All figures: {args.output}")


def run(args: argparse.Namespace) -> tuple[list[Choice], dict[int, Choice]]:
    """Measure, write the results and store the best choice: all choices, and the best one of each batch size."""
    from cllm.cli.guess import check_guess
    from cllm.cli.model import open_model
    from cllm.evaluation.choice import fastest
    from cllm.evaluation.environment import check_writable, environment
    from cllm.files import write_json
    from cllm.models import store_choice
    from cllm.tasks import get_task

    for name in args.guess:
        check_guess(name)
    check_writable(args.output)
    if args.save and not Path(args.model, "config.json").is_file():
        raise UsageError(f"--save needs a local checkpoint, got {args.model!r}")
    task = get_task(args.task).configure(args)
    of = open_model(args, task.plain_template)
    measured = _measure(args, of, task)
    best = {size: fastest(measured, size) for size in args.batch_size}
    report = {
        "settings": vars(args),
        "environment": environment(of.model.device),
        "choices": [asdict(m) for m in measured],
        "best": {size: {"width": m.width, "drafts": m.drafts, "guess": m.guess} for size, m in best.items()},
    }
    write_json(args.output, report)
    if args.save:
        first = best[args.batch_size[0]]
        store_choice(args.model, first.width, first.guess, first.drafts)
    return measured, best


def _measure(args: argparse.Namespace, of: OpenModel, task: Any) -> list[Choice]:
    from tqdm import tqdm

    from cllm.adapter import attached
    from cllm.evaluation import prompt
    from cllm.evaluation.choice import CANDIDATES, lossless_candidates, measure_choices
    from cllm.models import context_length
    from cllm.tasks.source import load_examples

    examples = load_examples(task, prompt.default_file(args.filename, Path.cwd()), "test", args.data_size)
    prompts, _ = prompt.encode(examples, of.template, of.tokenizer, context_length(of.model.config))
    lossless = attached(of.model) is not None
    guesses = args.guess
    if AUTO in guesses:
        guesses = lossless_candidates(of.record) if lossless else CANDIDATES
    return measure_choices(
        of.model,
        [p.ids for p in prompts],
        sorted(set(args.widths or (LOSSLESS_WIDTHS if lossless else WIDTHS))),
        list(dict.fromkeys(guesses)),
        list(dict.fromkeys(args.batch_size)),
        max_new_tokens=args.max_new_seq_len,
        drafts=sorted(set(args.drafts)),
        eos_ids=of.stops,
        seed=args.seed,
        progress=lambda items: tqdm(items, desc="tune", file=sys.stderr, disable=None),
    )


def render(measured: Sequence[Choice], best: Mapping[int, Choice]) -> str:
    """The table for people, the best choice of each batch size marked; fewer prompts: it was slower than others on those."""
    from cllm.evaluation.table import format_table, number

    rows = [
        [
            m.guess,
            str(m.width),
            str(m.drafts),
            str(m.batch_size),
            str(m.batch_size * m.batches),
            number(1000 * m.seconds, 1),
            number(m.tokens_per_forward),
            number(m.tokens_per_second, 1) + (" *" if m is best[m.batch_size] else "  "),
        ]
        for m in measured
    ]
    names = ["guess", "width", "drafts", "batch", "prompts"]
    return format_table([*names, "milliseconds\nper iteration", "tokens per\nforward", "tokens/s  "], rows)
