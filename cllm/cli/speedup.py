"""``cllm speedup`` and ``eval/*/speedup.py``: decoding speed, and the quality of the text beside it."""

from __future__ import annotations

from collections.abc import Sequence

from cllm.cli.command import add_options, add_task_option, command, memory_advice, parser, read
from cllm.evaluation.arguments import SpeedArguments


@command
def main(argv: Sequence[str] | None = None, *, task: str | None = None) -> None:
    options = parser(
        "Tokens per forward and per second of Jacobi decoding against autoregressive (AR) decoding of the same model.",
        "cllm speedup" if task is None else "speedup.py",
    )
    add_task_option(options, task, "speedup", argv)
    add_options(options, SpeedArguments)
    options.add_argument("--output", default="speedup.json", help="where the results go")
    given = vars(options.parse_args(argv))
    output, args = given.pop("output"), read(SpeedArguments, given)
    from cllm.evaluation.environment import check_writable
    from cllm.evaluation.speed_run import measure_speed
    from cllm.evaluation.speed_text import render_speed
    from cllm.files import write_json

    check_writable(output)
    with memory_advice(f"out of memory at --batch_size {args.batch_size}; try a smaller one"):
        report = measure_speed(args)
    write_json(output, report)
    print(render_speed(report))
    print(f"\nAll figures, settings and responses: {output}")
