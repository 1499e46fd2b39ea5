"""What the benchmarks share: options, model and prompts, counting forwarded tokens, the result file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cllm.evaluation.environment import environment
from cllm.files import write_json
from cllm.models import load_model, load_tokenizer
from cllm.prompts import choose_template
from cllm.tasks import get_task
from cllm.tasks.source import load_examples
from cllm.trajectory.collect import Collector, Prompt
from cllm.trajectory.record import Dropped, TrajectoryRow


def add_options(options: argparse.ArgumentParser, prompts: int) -> None:
    options.add_argument("--model", required=True)
    options.add_argument("--filename", help="GSM8K questions; default: the hub dataset")
    options.add_argument("--prompts", type=int, default=prompts)
    options.add_argument("--block_size", type=int, default=16)
    options.add_argument("--length", type=int, default=128, help="new tokens per response")
    options.add_argument("--output", help="where to write the result as JSON")


def load(args: argparse.Namespace):
    """Model in float32, tokenizer, and the token ids of the first prompts."""
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype="float32")
    task = get_task("gsm8k")
    template = choose_template(None, task.plain_template, tokenizer, {})
    examples = load_examples(task, args.filename, "train", args.prompts)
    return model, tokenizer, [template.encode(example.messages, tokenizer) for example in examples]


def collect(collector: Collector, prompts: list[list[int]]) -> tuple[list[TrajectoryRow], list[Dropped]]:
    """The rows of some prompts, decoded together; a row's id is the prompt's number."""
    asked = [Prompt(str(number), ids, None) for number, ids in enumerate(prompts)]
    (responses,) = collector.respond(asked, len(asked))
    return collector.rows(responses)


class Forwarded:
    """Counts the tokens, padding included, that go through a model's forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.tokens, self.calls = model, 0, 0

    def __enter__(self) -> Forwarded:
        self.hook = self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()

    def _count(self, module, args, kwargs) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.tokens, self.calls = self.tokens + ids.numel(), self.calls + 1


def publish(args: argparse.Namespace, model: PreTrainedModel, result: dict[str, Any]) -> None:
    """Print the result, and write it with settings, versions and device."""
    for name, value in result.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "filename", "model")}
        content = {
            "benchmark": Path(sys.argv[0]).stem,
            "settings": settings,
            "result": result,
            "environment": environment(model.device),
        }
        write_json(args.output, content)
