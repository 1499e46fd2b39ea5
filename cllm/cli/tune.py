"""``cllm tune``: find the window width that is fastest on this device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cllm.cli.command import add_model_options, add_task_option, command, parser, positive
from cllm.errors import UsageError

WIDTHS = (1, 2, 4, 6, 8, 12, 16, 24, 32)


def options(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    result = parser(
        "Measure what an iteration costs and gains at every width on this device, and name the fastest.", "cllm tune"
    )
    add_task_option(result, None, "tune", argv)
    add_model_options(result, "--model")
    result.add_argument("--filename", help="rows to take sample prompts from; default: the hub's test split")
    result.add_argument("--data_size", type=positive, default=8, help="sample prompts")
    result.add_argument("--max_new_seq_len", type=positive, default=128, help="new tokens per sample response at most")
    result.add_argument("--widths", type=positive, nargs="+", default=WIDTHS, help="widths to measure")
    result.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="batch sizes to measure")
    result.add_argument("--seed", type=int, default=0, help="of the fresh guesses")
    result.add_argument("--output", default="tune.json", help="where the results go")
    result.add_argument(
        "--save", action="store_true", help="store the best width at the first batch size in the checkpoint's config.json"
    )
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv).parse_args(argv)
    from cllm.cli.model import open_model
    from cllm.evaluation import prompt, width
    from cllm.evaluation.environment import check_writable, environment
    from cllm.files import write_json
    from cllm.models import context_length, store_width
    from cllm.tasks import get_task
    from cllm.tasks.source import load_examples

    check_writable(args.output)
    if args.save and not Path(args.model, "config.json").is_file():
        raise UsageError(f"--save needs a local checkpoint, got {args.model!r}")
    task = get_task(args.task).configure(args)
    examples = load_examples(task, prompt.default_file(args.filename, Path.cwd()), "test", args.data_size)
    of = open_model(args, task.plain_template)
    prompts, _ = prompt.encode(examples, of.template, of.tokenizer, context_length(of.model.config))
    measured = width.measure_widths(
        of.model,
        [p.ids for p in prompts],
        sorted(set(args.widths)),
        list(dict.fromkeys(args.batch_size)),
        max_new_tokens=args.max_new_seq_len,
        eos_ids=of.stops,
        seed=args.seed,
    )
    best = {size: width.fastest(measured, size) for size in args.batch_size}
    report = {
        "settings": vars(args),
        "environment": environment(of.model.device),
        "widths": [asdict(m) | {"tokens_per_second": m.tokens_per_second} for m in measured],
        "best": {size: m.width for size, m in best.items()},
    }
    write_json(args.output, report)
    print(render(measured, best))
    if args.save:
        store_width(args.model, best[args.batch_size[0]].width)
        print(f"Width {best[args.batch_size[0]].width} stored in {Path(args.model, 'config.json')}")
    print(f"All figures: {args.output}")


def render(measured: Sequence, best: dict) -> str:
    """The table for people, the best width of each batch size marked."""
    from cllm.evaluation.table import format_table, number

    rows = [
        [
            str(m.batch_size),
            str(m.width),
            number(1000 * m.seconds, 1),
            number(m.tokens_per_forward),
            number(m.tokens_per_second, 1) + (" *" if m is best[m.batch_size] else "  "),
        ]
        for m in measured
    ]
    return format_table(["batch", "width", "milliseconds\nper iteration", "tokens per\nforward", "tokens/s  "], rows)
