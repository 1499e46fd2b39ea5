"""``cllm report``: one page and pictures from a folder of result files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cllm.cli.command import command, parser

SHOWN = 10  # skipped files that are named; the page names them all


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(
        "Make one self-contained HTML page, and PNG pictures beside it, from the result files below a folder: those of "
        "speedup, acc and tune, trainer_state.json, and those of scripts/benchmarks.",
        "cllm report",
    )
    options.add_argument("results_dir", metavar="RESULTS_DIR", type=Path, help="folder that is searched, with all below it")
    options.add_argument("--output", metavar="FILE.html", type=Path, default=Path("report.html"), help="where the page goes")
    args = options.parse_args(argv)
    from cllm.evaluation.report import write_report
    from cllm.evaluation.results import read_results

    results = read_results(args.results_dir)
    written = write_report(results, args.output, f"Results in {args.results_dir.name or args.results_dir.resolve().name}")
    print(f"{len(results.files)} result files read: {', '.join(results.files)}")
    if results.skipped:
        print(f"{len(results.skipped)} other files skipped:")
        for name, why in list(results.skipped.items())[:SHOWN]:
            print(f"  {name}: {why}")
        if len(results.skipped) > SHOWN:
            print(f"  ... and {len(results.skipped) - SHOWN} more, all named in the page")
    print("Written: " + ", ".join(map(str, written)))
