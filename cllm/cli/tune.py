"""``cllm tune``: find the window, the draft and the fresh guesses that are fastest on this device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cllm.cli.command import add_task_option, command, parser, read_with_output
from cllm.evaluation.arguments import TuneArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(
        "Measure what an iteration costs and gains with every width and guess on this device, and name the fastest.",
        "cllm tune",
    )
    add_task_option(options, None, "tune", argv)
    args, output = read_with_output(options, TuneArguments, argv, "tune.json")
    from cllm.evaluation.tune import render_choices, tune
    from cllm.files import write_json

    report = tune(args)
    write_json(output, report)
    print(render_choices(report))
    if args.save:
        first = report["best"][args.batch_size[0]]
        drafts = f", {first['drafts']} draft tokens" * (first["drafts"] > 0)
        print(f"Width {first['width']}{drafts} and guess {first['guess']} stored in {Path(args.model, 'config.json')}")
    print(f"All figures: {output}")
