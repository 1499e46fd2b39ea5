"""The quick start's last page: one table, one picture.  python quickstart_report.py FOLDER"""

from __future__ import annotations

import json
import os
import sys
from itertools import chain
from pathlib import Path

from cllm.evaluation import plot
from cllm.evaluation.table import format_table, number, percent, with_interval

FULL_SIZE = """The full-size recipe (paper: GSM8K, Abel-7B, which is a target model already; 8 GPUs; not run by this script):
  cd data && accelerate launch generate_trajectory_gsm8k.py --model GAIR/Abel-7B-001 --use_aug --use_labels \\
      --max_new_tokens 16 --max_new_seq_len 512
  cd ../cllm && NUM_PROCESSES=8 bash train_cllm.sh GAIR/Abel-7B-001 ../data/collected_jacobi_trajectory/FOLDER OUTPUT 16 \\
      --bf16 --learning_rate 2e-5 --gradient_checkpointing
  cd ../eval/gsm8k && python speedup.py --test_model OUTPUT && python acc.py --model_dir OUTPUT --use_consistency_decoding"""


def main(folder: Path) -> None:
    before, after = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after"))
    print()
    print(table(before, after))
    seconds = dict(line.split(": ") for line in (folder / "seconds.txt").read_text().splitlines())
    print("\nseconds per stage: " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    picture = folder / "accepted.png"
    draw(before, after, picture)
    print(f"picture of where tokens were accepted: {picture}")
    print(f"details: {folder}/before.txt, {folder}/after.txt; talk to it: bash scripts/chat.sh {folder}/cllm arithmetic")
    activate = Path(os.path.relpath(sys.prefix)) / "bin" / "activate"
    print(f"width and guesses that are fastest on this machine: source {activate}; cllm tune --model {folder}/cllm \\")
    print(f"  --task arithmetic --filename {folder}/test.jsonl --save\n")
    print(FULL_SIZE)


def table(before: dict, after: dict) -> str:
    methods = [run["methods"] for run in (before, after)]
    quality = [after["quality"]["target"], after["quality"]["jacobi"]]
    rows = [
        ("tokens per forward, Jacobi", *(tpf(run["jacobi"]) for run in methods)),
        ("tokens/s, Jacobi", *(number(run["jacobi"]["tokens_per_second"], 1) for run in methods)),
        ("tokens/s, AR", *(number(run["ar"]["tokens_per_second"], 1) for run in methods)),
        ("speedup over AR", *(speedup(run["jacobi"]) for run in methods)),
        ("Jacobi text equals AR text", *(percent(run["jacobi"]["same_as_ar"]) for run in methods)),
        ("tokens in repeated 4-grams", *(percent(one["repetition"]) for one in quality)),
        ("NLL under the target, nats/token", *(number(one["nll_per_token"]) for one in quality)),
        ("accuracy", *(percent(one["score"]) for one in quality)),
    ]
    return format_table((f"{before['data']['prompts']} held-out problems", "target model", "CLLM"), rows)


def tpf(jacobi: dict) -> str:
    return with_interval(jacobi["tokens_per_forward"], jacobi["tokens_per_forward_interval"])


def speedup(jacobi: dict) -> str:
    return with_interval(jacobi["speedup"], jacobi["speedup_interval"])


def draw(before: dict, after: dict, path: Path) -> None:
    """Above: how far each response had come after each forward. Below: how many tokens the forwards gained."""
    accepted = {
        name: [prompt["methods"]["jacobi"]["accepted"] for prompt in run["prompts"]]
        for name, run in (("target model", before), ("CLLM", after))
    }
    figure, (top, bottom) = plot.new_figure(2, 1, size=(8, 8))
    plot.progress(top, accepted)
    top.set(title="Every held-out response, forward by forward")
    plot.histogram(bottom, {name: list(chain.from_iterable(responses)) for name, responses in accepted.items()})
    path.write_bytes(plot.png(figure))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
