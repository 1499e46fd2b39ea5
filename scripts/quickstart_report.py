"""The quick start's report: one table and one picture.  python quickstart_report.py FOLDER"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from cllm.evaluation import plot
from cllm.evaluation.table import format_table, number, percent, with_interval
from cllm.tasks import OWN_PROMPTS, get_task
from cllm.tasks.base import Example
from cllm.tasks.configure import configured_task
from cllm.tasks.source import load_examples

FULL_SIZE = """At full size, with a 7B target that has learned GSM8K (not run by this script):
  cllm make GAIR/Abel-7B-001 gsm8k abel-cllm --max_new_seq_len 512
  cllm acc --task gsm8k --model_dir abel-cllm --use_consistency_decoding
As in the paper, with all weights trained: bash scripts/recipes/gsm8k_7b.sh"""


@dataclass(frozen=True)
class Column:
    """One model's figures: a method in a result file, and the quality of its text."""

    title: str
    method: dict[str, Any]
    score: float | None
    same_text: float  # share of prompts with the text of the target's AR decoding


def main(folder: Path) -> None:
    made, lossless = _read(folder / "cllm/make.json"), _read(folder / "cllm/make/speedup.json")
    paper = _read(folder / "paper.json") if (folder / "paper.json").exists() else None
    print()
    print(table(columns(lossless, execution_accuracy(folder, lossless), paper), lossless["data"]["prompts"]))
    where = lossless["environment"]
    print(f"in {lossless['settings']['dtype']} on {where['device_name']}, {where['threads']} threads")
    if made["reason"]:
        print(f"{made['reason']}; width 1, which is AR decoding, is stored")
    stages = dict(line.split(": ") for line in (folder / "seconds.txt").read_text().splitlines())
    print(f"\nseconds per stage: {_listed(stages)}")
    print(f"those of make: {_listed(made['seconds'])}")
    picture = folder / "accepted.png"
    draw(lossless, paper, picture)
    print(f"picture of accepted tokens: {picture}")
    print(f"details: {folder}/cllm/README.md and {folder}/cllm/report.html; to chat: bash scripts/chat.sh {folder}/cllm spider\n")
    print(FULL_SIZE)


def execution_accuracy(folder: Path, measured: dict) -> float:
    """Share of the measured texts that answer their questions correctly."""
    task = configured_task("spider", "speedup", filename=str(folder / "data"))
    examples = {_question(example): example for example in load_examples(task, folder / "data", "test")}
    asked = load_examples(get_task(OWN_PROMPTS), folder / "cllm/make/held_out.jsonl", "test")
    texts = [prompt["responses"]["jacobi"] for prompt in measured["prompts"]]
    scores = task.score_all([(text, examples[_question(prompt)]) for text, prompt in zip(texts, asked, strict=True)])
    return sum(each[task.metric] for each in scores) / len(scores)


def _question(example: Example) -> str:
    return example.messages[-1]["content"]


def columns(lossless: dict, score: float, paper: dict | None) -> list[Column]:
    """The columns of the table: the target model by AR decoding, the CLLM, and the model with all weights trained, if any."""
    methods, same = lossless["methods"], lossless["methods"]["jacobi"]["same_as_ar"]
    found = [
        Column("target model", methods["ar"], score if same == 1 else None, 1.0),
        Column("CLLM", methods["jacobi"], score, same),
    ]
    if paper:
        quality = paper["quality"]["jacobi"]
        found.append(Column("all weights (paper)", paper["methods"]["jacobi"], quality["score"], quality["same_as_target"]))
    return found


def table(shown: list[Column], prompts: int) -> str:
    rows = [
        ("tokens per forward", *(tpf(column.method) for column in shown)),
        ("tokens/s", *(number(column.method["tokens_per_second"], 1) for column in shown)),
        ("speedup over AR", *(speedup(column.method) for column in shown)),
        ("execution accuracy", *(percent(column.score) for column in shown)),
        ("text equals the target's", *(percent(column.same_text) for column in shown)),
    ]
    return format_table((f"{prompts} held-out questions", *(column.title for column in shown)), rows)


def tpf(jacobi: dict) -> str:
    return with_interval(jacobi["tokens_per_forward"], jacobi["tokens_per_forward_interval"])


def speedup(jacobi: dict) -> str:
    """The speedup over AR decoding of the same model in the same run, with its interval."""
    return with_interval(jacobi["speedup"], jacobi["speedup_interval"])


def draw(lossless: dict, paper: dict | None, path: Path) -> None:
    """Draw the progress of each response by forward (top), and a histogram of tokens gained per forward (bottom)."""
    runs = {"target model": (lossless, "ar"), "CLLM": (lossless, "jacobi")}
    if paper:
        runs["all weights (paper)"] = (paper, "jacobi")
    accepted = {title: [prompt["methods"][method]["accepted"] for prompt in run["prompts"]] for title, (run, method) in runs.items()}
    figure, (top, bottom) = plot.new_figure(2, 1, size=(8, 8))
    progress(top, accepted)
    top.set(title="Every held-out response, forward by forward")
    plot.histogram(bottom, {title: list(chain.from_iterable(responses)) for title, responses in accepted.items()})
    path.write_bytes(plot.png(figure))


def progress(axes: Any, accepted: dict[str, list[list[int]]]) -> None:
    """How far each response had come after each forward; ``accepted``: for each name, the gains of each response."""
    for index, (name, responses) in enumerate(accepted.items()):
        for place, gains in enumerate(responses):
            label = None if place else name
            axes.plot(list(accumulate(gains, initial=0)), color=plot.colour(index), alpha=0.5, linewidth=1, label=label)
    longest = max(sum(gains) for responses in accepted.values() for gains in responses)
    axes.plot([0, longest], [0, longest], "k--", linewidth=1, label="AR decoding: one token a forward")
    axes.set(xlabel="forward passes", ylabel="tokens accepted")
    axes.legend()


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
