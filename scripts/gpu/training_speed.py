"""Stage `training`: tokens/s and memory of the lossless and the paper's objective, with SDPA and FlexAttention.

Every step is about the same responses, so shapes repeat and FlexAttention is compiled once; those steps come first and do not
count.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import stage
import torch
from common import peak_memory

PAPER = ["--teacher", "self", "--ar_loss", "fixed_point", "--distance_decay", "1", "--states_per_block", "1"]
FLEX = ["--attn_implementation", "flex_attention"]
SIDES = {"lossless, SDPA": ["--lossless"], "paper's, SDPA": PAPER, "paper's, FlexAttention": [*PAPER, *FLEX]}
WARM_UP = 3  # steps


@dataclass(frozen=True)
class Sizes:
    responses: int
    length: int
    steps: int  # that count


FULL, TINY = Sizes(32, 128, 10), Sizes(4, 16, 2)


def main() -> None:
    options = stage.options(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl.gz")
    options.add_argument("--work", type=Path, required=True, help="folder for all that lies on the way")
    args = options.parse_args()
    sizes = TINY if args.rehearse else FULL
    rows = ["--task", "gsm8k", "--model", args.model, "--filename", args.data / "train.jsonl.gz", "--data_size", sizes.responses]
    how = ["--max_new_seq_len", sizes.length, "--batch_size", sizes.responses, "--device", stage.device(args)]
    stage.command("collect", *rows, *how, "--output", args.work / "trajectories")
    result = {}
    for name, objective in SIDES.items():
        if not (args.rehearse and FLEX[-1] in objective):  # it has no gradients on a CPU
            result[name] = measure(args, objective, sizes)
    stage.publish(args, "training", result)


def measure(args: Namespace, objective: list[str], sizes: Sizes) -> dict[str, float]:
    """Medians over steps, each of all responses together."""
    folder = args.work / "trained"
    shutil.rmtree(folder, ignore_errors=True)
    what = ["--model", args.model, "--trajectories", args.work / "trajectories", "--output_dir", folder, *objective]
    how = ["--per_device_train_batch_size", sizes.responses, "--max_steps", WARM_UP + sizes.steps, "--logging_steps", 1]
    how += ["--save_strategy", "no", "--report_to", "none", "--use_cpu" if args.rehearse else "--bf16"]
    start = time.perf_counter()
    with peak_memory(torch.device(stage.device(args))) as peak:
        stage.command("train", *what, *how)
    logged = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in logged if "tokens_per_second" in entry][WARM_UP:]
    return {
        "tokens/s": statistics.median(entry["tokens_per_second"] for entry in steps),
        "share that is not padding": statistics.median(entry["useful_tokens"] for entry in steps),
        "peak memory, GiB": max(peak) / 2**30,
        "seconds, loading and compiling included": time.perf_counter() - start,
    }


if __name__ == "__main__":
    main()
