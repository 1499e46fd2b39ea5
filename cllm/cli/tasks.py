"""``cllm tasks``: the tasks to collect from, to train for and to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent, wrap

from cllm.cli.command import command, parser
from cllm.tasks import get_task, task_names
from cllm.tasks.base import Task

WIDTH = 100


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser("List the tasks with their data, metric and prompt templates.", "cllm tasks")
    options.add_argument("task", nargs="*", metavar="TASK", help="only these")
    args = options.parse_args(argv)
    print("\n\n".join(render(get_task(name)) for name in args.task or task_names()))
    if not args.task:
        print("\n" + render_templates())


def render(task: Task) -> str:
    """A task as text for people."""
    from cllm.checkpoints import published_for

    facts = {
        "data": _data(task),
        "rows": task.fields,
        "metric": task.metric,
        "plain prompt": repr(task.plain_template),
        "export": task.export_format or "",
    }
    for checkpoint in published_for(task.name):
        kind = "CLLM" if checkpoint.target else "target"
        facts[f"published {kind}"] = f"{checkpoint.name} (--prompt_template {checkpoint.prompt_template})"
    return "\n".join([f"{task.name}: {task.description}", *(_fact(name, text) for name, text in facts.items() if text)])


def render_templates() -> str:
    from cllm.prompts import CHAT, DIALOGUES, PLAIN

    lines = [
        "--prompt_template, where the checkpoint does not decide:",
        _fact(CHAT, "the tokenizer's chat template"),
        _fact(PLAIN, "the task's plain prompt, above"),
        *(_fact(name, repr(dialogue.text)) for name, dialogue in DIALOGUES.items()),
        _fact("any text", "with {question} in it"),
    ]
    return "\n".join(lines)


def _data(task: Task) -> str:
    if task.hub is None:
        return "local only (--filename)"
    parts = [task.hub.path, *filter(None, (task.hub.config, task.hub.data_files))]
    splits = ", ".join(f"{ours}: {theirs}" for ours, theirs in task.hub.splits.items())
    return f"hub {' / '.join(parts)} ({splits}), or --filename"


def _fact(name: str, text: str) -> str:
    head, *more = wrap(text, WIDTH - 20, break_on_hyphens=False) or [""]
    return indent("\n".join([f"{name:<18}{head}", *(" " * 18 + line for line in more)]), "  ")
