"""``cllm collect`` and ``data/generate_trajectory_*.py``: the trajectories of a target model."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cllm.cli.command import add_options, add_task_option, command, parser, read
from cllm.trajectory.arguments import CollectArguments


@command
def main(argv: Sequence[str] | None = None, *, task: str | None = None) -> None:
    options = parser("Drive a target model with Jacobi iteration and store the trajectories.", "cllm collect")
    add_task_option(options, task, "collect", argv)
    add_options(options, CollectArguments)
    args = read(CollectArguments, vars(options.parse_args(argv)))
    from cllm.trajectory.collection import collect
    from cllm.trajectory.departures import describe

    found = collect(args)
    if int(os.environ.get("RANK", 0)):
        return
    print(f"{found.kept} responses stored in {found.folder}")
    for reason, count in sorted(found.dropped.items()):
        print(f"  {count} left out: {reason}")
    for reason, count in sorted(found.bad_rows.items()):
        print(f"  {count} rows skipped: {reason}")
    for line in describe(found.compared, found.departures):
        print(line)
    found.check()
