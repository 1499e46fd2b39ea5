"""``cllm acc`` and ``eval/*/acc.py``: accuracy on a task."""

from __future__ import annotations

from collections.abc import Sequence

from cllm.cli.command import add_options, add_task_option, command, memory_advice, parser, read
from cllm.evaluation.arguments import AccuracyArguments


@command
def main(argv: Sequence[str] | None = None, *, task: str | None = None) -> None:
    options = parser(
        "Answer a task's questions and score the replies. An interrupted run resumes where it stopped.",
        "cllm acc" if task is None else "acc.py",
    )
    add_task_option(options, task, "acc", argv)
    add_options(options, AccuracyArguments)
    args = read(AccuracyArguments, vars(options.parse_args(argv)))
    if not args.model and not args.eval_only:
        options.error("the following arguments are required: --model_dir")
    from cllm.evaluation.accuracy_run import measure_accuracy
    from cllm.evaluation.accuracy_text import render_accuracy

    with memory_advice(f"out of memory at --batch_size {args.batch_size}; run again with a smaller one, finished answers are kept"):
        report = measure_accuracy(args)
    print(render_accuracy(report))
    print(f"\nAnswers: {args.answers_file}\nScores:  {args.scores_file}")
    if "export" in report:
        print(f"Export:  {report['export']}")
