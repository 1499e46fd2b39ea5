"""``cllm speedup`` and ``eval/*/speedup.py``: decoding speed, and the quality of the text beside it."""

from __future__ import annotations

from collections.abc import Sequence

from cllm.cli.command import add_task_option, command, memory_advice, parser, read_with_output
from cllm.evaluation.arguments import SpeedArguments


@command
def main(argv: Sequence[str] | None = None, *, task: str | None = None) -> None:
    options = parser(
        "Tokens per forward and per second of Jacobi decoding against autoregressive (AR) decoding of the same model.",
        "cllm speedup" if task is None else "speedup.py",
    )
    add_task_option(options, task, "speedup", argv)
    args, output = read_with_output(options, SpeedArguments, argv, "speedup.json")
    from cllm.evaluation.speed_run import measure_speed
    from cllm.evaluation.speed_text import render_speed
    from cllm.files import write_json

    with memory_advice(f"out of memory at --batch_size {args.batch_size}; try a smaller one"):
        report = measure_speed(args)
    write_json(output, report)
    print(render_speed(report))
    print(f"\nAll figures, settings and responses: {output}")
