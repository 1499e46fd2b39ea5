"""Is collapse detected in time? The paper-style training of the quick start at ten times its learning rate, with probes.

bash scripts/quickstart.sh --paper && python scripts/benchmarks/collapse.py --data quickstart --output collapse.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import add_output, parser, publish

from cllm.cli import train
from cllm.models import load_model, read_record

QUICKSTART = (
    "--num_train_epochs=2 --per_device_train_batch_size=4 --adam_beta2=0.95 --states_per_block=2 --ar_weight=10 "
    "--train_sampling_strategy=group_by_length --lr_scheduler_type=cosine --warmup_steps=0.05 "
    "--logging_steps=1 --save_strategy=no --report_to=none --use_cpu"
).split()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="the quick start's folder: target, trajectories, questions")
    options.add_argument("--learning_rate", type=float, default=1.5e-3)
    options.add_argument("--prompts", type=int, default=16)
    options.add_argument("--length", type=int, default=64, help="new tokens per response")
    add_output(options)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train.main([*QUICKSTART, *_words(args), f"--output_dir={folder}"])
        state = json.loads(Path(folder, "trainer_state.json").read_text())
        model = load_model(folder, device="cpu")  # the best good model, which training has saved
    result = summary(state)
    result["the last good one loads, and says it is a CLLM"] = "block_size" in read_record(model.config)
    publish(args, model, result)


def _words(args: argparse.Namespace) -> list[str]:
    return [
        f"--model={args.data / 'target'}",
        f"--trajectories={args.data / 'trajectories'}",
        f"--learning_rate={args.learning_rate}",
        f"--probe_file={args.data}/data",
        f"--probe_prompts={args.prompts}",
        f"--probe_length={args.length}",
        "--on_collapse=stop",
    ]


def summary(state: dict[str, Any]) -> dict[str, Any]:
    """Where training stopped, which model it kept, and the metrics of all probes."""
    checks = [entry for entry in state["log_history"] if any(name.startswith("probe_") for name in entry)]
    return {
        "planned steps": state["max_steps"],
        "stopped at step": state["global_step"],
        "share of the plan": state["global_step"] / state["max_steps"],
        "step of the last good model": state["best_global_step"],
        "its tokens per forward": state["best_metric"],
        "checks": checks,
        "losses": [{"step": entry["step"], "loss": entry["loss"]} for entry in state["log_history"] if "loss" in entry],
    }


if __name__ == "__main__":
    main()
