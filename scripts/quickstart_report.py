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

FULL_SIZE = """The full-size recipe (the paper's GSM8K with Abel-7B, which is already a target model, on 8 GPUs; not run by this script):
  cd data && accelerate launch generate_trajectory_gsm8k.py --model GAIR/Abel-7B-001 --max_new_tokens 8 --max_new_seq_len 512 \\
      --responses_only
  cd ../cllm && NUM_PROCESSES=8 bash train_cllm.sh GAIR/Abel-7B-001 ../data/collected_jacobi_trajectory/FOLDER OUTPUT 8 \\
      --lossless --bf16
  cd ../eval/gsm8k && python speedup.py --test_model OUTPUT && python acc.py --model_dir OUTPUT --use_consistency_decoding"""


@dataclass(frozen=True)
class Column:
    """One model's figures: a method in a result file, and the quality of its text."""

    title: str
    method: dict[str, Any]
    score: float
    same_text: float  # share of prompts with the text of the target's AR decoding


def main(folder: Path) -> None:
    lossless = json.loads((folder / "cllm.json").read_text())
    paper = json.loads((folder / "paper.json").read_text()) if (folder / "paper.json").exists() else None
    print()
    print(table(lossless, paper))
    where = lossless["environment"]
    print(f"in {lossless['settings']['dtype']} on {where['device_name']}, {where['threads']} threads")
    seconds = dict(line.split(": ") for line in (folder / "seconds.txt").read_text().splitlines())
    print("\nseconds per stage: " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    picture = folder / "accepted.png"
    draw(lossless, paper, picture)
    print(f"picture of accepted tokens: {picture}")
    print(f"details: {folder}/cllm.txt, {folder}/tune.json; to chat: bash scripts/chat.sh {folder}/cllm spider\n")
    print(FULL_SIZE)


def columns(lossless: dict, paper: dict | None) -> list[Column]:
    """The columns of the table: the target model by AR decoding, the CLLM, and the model with all weights trained, if any."""
    methods, score = lossless["methods"], lossless["quality"]["jacobi"]["score"]
    found = [
        Column("target model", methods["ar"], score, 1.0),
        Column("CLLM", methods["jacobi"], score, methods["jacobi"]["same_as_ar"]),
    ]
    if paper:
        quality = paper["quality"]["jacobi"]
        found.append(Column("all weights (paper)", paper["methods"]["jacobi"], quality["score"], quality["same_as_target"]))
    return found


def table(lossless: dict, paper: dict | None) -> str:
    shown = columns(lossless, paper)
    rows = [
        ("tokens per forward", *(tpf(column.method) for column in shown)),
        ("tokens/s", *(number(column.method["tokens_per_second"], 1) for column in shown)),
        ("speedup over AR", *(speedup(column.method) for column in shown)),
        ("execution accuracy", *(percent(column.score) for column in shown)),
        ("text equals the target's", *(percent(column.same_text) for column in shown)),
    ]
    return format_table((f"{lossless['data']['prompts']} held-out questions", *(column.title for column in shown)), rows)


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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
