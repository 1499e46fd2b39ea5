"""The quick start's last page: one table, one picture.  python quickstart_report.py FOLDER"""

from __future__ import annotations

import json
import sys
from itertools import accumulate
from pathlib import Path

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
    seconds = dict(line.split() for line in (folder / "seconds.txt").read_text().splitlines())
    print("\nseconds per stage: " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    picture = folder / "accepted.png"
    draw(before, after, picture)
    print(f"picture of where tokens were accepted: {picture}")
    print(f"details: {folder}/before.txt, {folder}/after.txt; talk to it: bash scripts/chat.sh {folder}/cllm arithmetic")
    print("tokens/s on a CPU: a wider window costs more there; a GPU has the arithmetic to spare.\n")
    print(FULL_SIZE)


def table(before: dict, after: dict) -> str:
    methods = [run["methods"] for run in (before, after)]
    quality = [after["quality"]["target"], after["quality"]["jacobi"]]
    rows = [
        ("tokens per forward, Jacobi", *(tpf(run["jacobi"]) for run in methods)),
        ("tokens/s, Jacobi", *(number(run["jacobi"]["tokens_per_second"], 1) for run in methods)),
        ("tokens/s, AR", *(number(run["ar"]["tokens_per_second"], 1) for run in methods)),
        ("Jacobi text equals AR text", *(percent(run["jacobi"]["same_as_ar"]) for run in methods)),
        ("tokens in repeated 4-grams", *(percent(one["repetition"]) for one in quality)),
        ("NLL under the target, nats/token", *(number(one["nll_per_token"]) for one in quality)),
        ("accuracy", *(percent(one["score"]) for one in quality)),
    ]
    return format_table((f"{before['data']['prompts']} held-out problems", "target model", "CLLM"), rows)


def tpf(jacobi: dict) -> str:
    return with_interval(jacobi["tokens_per_forward"], jacobi["tokens_per_forward_interval"])


def draw(before: dict, after: dict, path: Path) -> None:
    """Above: how far each response had come after each forward. Below: how many tokens the forwards gained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 8), layout="constrained")
    gains = {}
    for run, name, colour in ((before, "target model", "tab:gray"), (after, "CLLM", "tab:blue")):
        accepted = [prompt["methods"]["jacobi"]["accepted"] for prompt in run["prompts"]]
        for index, steps in enumerate(accepted):
            progress = list(accumulate(steps, initial=0))
            top.plot(progress, color=colour, alpha=0.5, linewidth=1, label=name if index == 0 else None)
        gains[name] = [step for steps in accepted for step in steps]
    longest = max(len(p["methods"]["ar"]["accepted"]) for p in after["prompts"])
    top.plot([0, longest], [0, longest], "k--", linewidth=1, label="AR decoding: one token a forward")
    top.set(xlabel="forward passes", ylabel="tokens accepted", title="Every held-out response, forward by forward")
    top.legend()
    widths = range(1, max(map(max, gains.values())) + 1)
    for offset, (name, colour) in zip((-0.2, 0.2), (("target model", "tab:gray"), ("CLLM", "tab:blue"))):
        share = [gains[name].count(width) / len(gains[name]) for width in widths]
        bottom.bar([width + offset for width in widths], share, width=0.4, color=colour, label=name)
    bottom.set(xlabel="tokens accepted in one forward", ylabel="share of forwards")
    bottom.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
