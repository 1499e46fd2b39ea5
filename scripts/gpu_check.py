"""Checks and measures decoding on one device; see gpu_check.sh.

What must hold (exit status 1 where it does not): captured and compiled steps give the texts of plain ones, in float32 and for
all guesses, with rows that join and leave; between two looks at the rows the host waits for nothing. What is measured:
tokens per second of AR against Hugging Face's eager generate, a step of width 16 against one of width 1, batches of 1 to 16.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cllm.decoding import JacobiDecoder, Queue, Request, Sampling
from cllm.decoding.guess import STRATEGIES
from cllm.evaluation.environment import environment
from cllm.evaluation.method import HuggingFace
from cllm.evaluation.speed import now
from cllm.files import write_json
from cllm.models import load_model

ROOT = Path(__file__).resolve().parents[1]
GUESSES = (*STRATEGIES, "pool+prompt_lookup")
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "Memcpy DtoH", "_local_scalar_dense", "aten::nonzero")


def main() -> None:
    args = options().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; --device cpu runs the same checks without one", file=sys.stderr)
        sys.exit(2)
    on_gpu = args.device == "cuda"
    if on_gpu:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT, check=True)
    path = args.model or small_model()
    modes = ("off", "graph", "compile") if on_gpu else ("off",)
    exact = load_model(path, dtype="float32", device=args.device)
    result: dict[str, Any] = {
        "texts equal": equality(exact, modes, args.length),
        "waits of the host in 32 steps": {mode: waits(exact, mode) for mode in modes},
    }
    model = load_model(path, dtype="bfloat16" if on_gpu else "float32", device=args.device)
    result["speed"] = {mode: speed(model, mode, args.batches, args.length) for mode in modes}
    result["tokens/s, Hugging Face generate, batch 1"] = generate_rate(model, args.length)
    write_json(args.output or result_file(args.device), {"result": result, "environment": environment(model.device)})
    failed = report(result)
    benchmark = ROOT / "scripts" / "benchmarks" / "decode.py"
    if on_gpu and benchmark.exists() and not failed:
        print(f"next, for the comparison with other methods: python {benchmark.relative_to(ROOT)} --help")
    sys.exit(bool(failed))


def options() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    result.add_argument("--model", help="default: SmolLM2-135M-Instruct, which scripts/small_model.py fetches")
    result.add_argument("--length", type=int, default=128, help="new tokens per response")
    result.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    result.add_argument("--output", help="default: docs/results/DEVICE.json")
    return result


def small_model() -> str:
    command = [sys.executable, str(ROOT / "scripts" / "small_model.py")]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def result_file(device: str) -> Path:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return ROOT / "docs" / "results" / f"gpu_check_{name.replace(' ', '_').lower()}.json"


def requests(vocabulary: int, count: int, length: int) -> list[Request]:
    """Prompts of 1 to 40 random tokens, half as many different ones as there are tokens; every third row is sampled."""
    draw = random.Random(0)
    return [
        Request(
            [draw.randrange(vocabulary // 2) for _ in range(draw.randint(1, 40))],
            draw.randint(1, length),
            Sampling(temperature=0.8, top_p=0.95, seed=number) if number % 3 == 2 else Sampling(),
        )
        for number in range(count)
    ]


def equality(model: Any, modes: tuple[str, ...], length: int) -> dict[str, str]:
    """For each way to run steps and each guess, how many of 12 texts equal those of plain AR decoding."""
    wanted = requests(model.config.vocab_size, 12, length)
    plain = dict(Queue(JacobiDecoder(model, 1, compile="off"), 4).run(wanted))
    result = {}
    for mode in modes:
        for guess in GUESSES:
            found = dict(Queue(JacobiDecoder(model, 8, guess=guess, compile=mode), 4).run(wanted))
            equal = sum(found[number].token_ids == row.token_ids for number, row in plain.items())
            result[f"{mode}, {guess}"] = f"{equal} of {len(plain)}"
    return result


def steps(model: Any, mode: str, width: int, batch: int, count: int, looks: bool = True) -> Iterator[Any]:
    """At least ``count`` iterations, with or without looks at the rows, behind a warm-up that captures them."""
    decoder = JacobiDecoder(model, width, compile=mode)
    if not looks:
        decoder.sync_interval = 1 << 30
    iterations = decoder.iterate([[1, 2, 3, 4 + row] for row in range(batch)], max_new_tokens=(count + 8) * width)
    for _ in range(6):
        next(iterations)
    return iterations


def waits(model: Any, mode: str) -> dict[str, int]:
    """What the host waited for during 32 steps of width 4, by the profiler's names."""
    iterations = steps(model, mode, 4, 2, 32, looks=False)
    now(model.device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA][: model.device.type == "cuda"]]
    with profile(activities=activities) as profiler:
        for _ in range(32):
            next(iterations)
    events = {event.key: event.count for event in profiler.key_averages()}
    return {name: count for name, count in events.items() if any(wait in name for wait in WAITS)}


def speed(model: Any, mode: str, batches: list[int], count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of width 1 and 16 (median of five rounds in turn), and AR's tokens per second."""
    result = {}
    for batch in batches:
        sides = {width: steps(model, mode, width, batch, count) for width in (1, 16)}
        times: dict[int, list[float]] = {width: [] for width in sides}
        for _ in range(5):
            for width, iterations in sides.items():
                start = now(model.device)
                for _ in range(count // 5):
                    next(iterations)
                times[width].append(1000 * (now(model.device) - start) / (count // 5))
        narrow, wide = (statistics.median(times[width]) for width in (1, 16))
        result[f"batch {batch}"] = {
            "milliseconds, width 1": narrow,
            "milliseconds, width 16": wide,
            "width 16 over width 1": wide / narrow,
            "tokens/s, AR without prefill": 1000 * batch / narrow,
        }
    return result


def generate_rate(model: Any, length: int) -> float:
    """Tokens per second of Hugging Face's eager generate at batch 1, prefill of four tokens included."""
    method = HuggingFace(model, [model.config.vocab_size - 1])
    method.decode([[1, 2, 3, 4]], length)
    start = now(model.device)
    (response,) = method.decode([[1, 2, 3, 4]], length)
    return len(response.token_ids) / (now(model.device) - start)


def report(result: dict[str, Any]) -> list[str]:
    """Print the result; returns what does not hold."""
    failed = [f"texts differ: {name}" for name, equal in result["texts equal"].items() if len(set(equal.split(" of "))) > 1]
    failed += [f"the host waits: {mode}: {found}" for mode, found in result["waits of the host in 32 steps"].items() if found]
    for name, value in result.items():
        print(f"{name}: {value}")
    for line in failed or ["all that must hold holds"]:
        print(line)
    return failed


if __name__ == "__main__":
    main()
