"""Training of a consistency adapter against the default objective of `cllm train`, on the same stored responses.

The two alternate, each turn in a new process that runs whole optimizer steps of the command with its defaults and the flags
after ``--``; the first step is not counted. Peak memory is the process's, including the model's weights.

    python scripts/benchmarks/lossless_training.py --model MODEL --trajectories FOLDER --output lossless_training.json \\
        -- --bf16 --attn_implementation eager
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

from common import add_output, parser, peak_memory, publish
from transformers import TrainerCallback

from cllm.cli.train import arguments
from cllm.models import load_model
from cllm.training.build import build_trainer

SIDES: dict[str, list[str]] = {"default objective": [], "lossless": ["--lossless"]}
WARM_UP = 1  # steps


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--trajectories", required=True, help="a folder that `cllm collect` wrote")
    options.add_argument("--batch_size", type=int, default=4)
    options.add_argument("--steps", type=int, default=6, help="timed steps per turn")
    options.add_argument("--rounds", type=int, default=3)
    add_output(options)
    options.add_argument("--side", choices=SIDES, help="measure only this side, in this process")
    options.add_argument("flags", nargs="*", help="flags of `cllm train` for both sides, after --")
    args = options.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side, measured in turns.items():
            measured.append(turn(side))
    medians = {side: median(measured) for side, measured in turns.items()}
    default, lossless = medians.values()
    result = {
        "responses per second": {side: args.batch_size / measured["seconds per step"] for side, measured in medians.items()},
        "peak bytes": {side: measured["peak bytes"] for side, measured in medians.items()},
        "times faster": default["seconds per step"] / lossless["seconds per step"],
        "times faster, by round": [a["seconds per step"] / b["seconds per step"] for a, b in zip(*turns.values())],
        "peak memory over the default objective's": lossless["peak bytes"] / default["peak bytes"],
    }
    publish(args, load_model(args.model, device="cpu"), result)


def median(turns: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over turns."""
    return {name: statistics.median(measured[name] for measured in turns) for name in turns[0]}


def turn(side: str) -> dict[str, float]:
    """The figures of one side, measured in a new process."""
    done = subprocess.run([sys.executable, sys.argv[0], "--side", side, *sys.argv[1:]], check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}: {measured['seconds per step']:.2f} s per step, {measured['peak bytes'] / 2**20:.0f} MiB", flush=True)
    return measured


def measure(args: argparse.Namespace) -> dict[str, float]:
    """The figures of ``args.side``, measured in this process."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--model={args.model}", f"--trajectories={args.trajectories}", f"--output_dir={folder}"]
        words += [f"--per_device_train_batch_size={args.batch_size}", f"--max_steps={WARM_UP + args.steps}"]
        words += ["--use_cpu", "--report_to=none", "--save_strategy=no"]
        inputs, training, parts = arguments([*words, *SIDES[args.side], *args.flags], "lossless_training.py")
        trainer = build_trainer(inputs, training, **parts)
        clock = Clock()
        trainer.add_callback(clock)
        with peak_memory(trainer.args.device) as peak:
            trainer.train()
    return {"seconds per step": statistics.mean(clock.seconds[WARM_UP:]), "peak bytes": peak[0]}


if __name__ == "__main__":
    main()
