"""Stage `speed`: what a step of each width costs, with and without an adapter's draft tokens, and AR by several hands.

Steps of all widths take turns. Also where the device waits for the host in 32 steps, by the profiler's names, and AR's tokens/s
by how many steps pass between two looks of the host at the rows. The adapter is a random one: what it guesses is no matter here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import stage
from tiny import random_adapter
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from cllm.decoding import JacobiDecoder
from cllm.decoding.engine import CUDA_SYNC_INTERVAL
from cllm.errors import UsageError
from cllm.evaluation.method import HuggingFace
from cllm.evaluation.speed import now
from cllm.models import load_model

# That the host waits for one iteration while the device computes the next is no harm; these leave the device without work.
WAITS = ("StreamSynchronize", "DeviceSynchronize", "Device -> Pageable", "_local_scalar_dense", "aten::nonzero")
WARM_UP = 6  # iterations: the prefill, and steps before and of the capture
ROUNDS = 5
LOOKS = (1, 2, 4, CUDA_SYNC_INTERVAL)
AR = "width 1"


@dataclass(frozen=True)
class Sizes:
    widths: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int  # of each width at each batch size
    length: int  # tokens of a response
    rank: int


FULL = Sizes(widths=(4, 8, 16, 32), batches=(1, 4, 16), steps=100, length=128, rank=64)
TINY = Sizes(widths=(4,), batches=(1, 2), steps=5, length=8, rank=2)


def main() -> None:
    options = stage.options(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--seconds", type=float, required=True, help="after which nothing more is compiled")
    args = options.parse_args()
    until = time.monotonic() + args.seconds
    model = load_model(args.model, dtype=stage.dtype(args), device=stage.device(args))
    sizes = TINY if args.rehearse else FULL
    result: dict[str, Any] = {"waits of the device in 32 steps": waits(stage.captured(args, model, 4))}
    result["steps"] = {f"batch {batch}": step_costs(args, model, batch, sizes) for batch in sizes.batches}
    result["tokens/s of AR at batch 1"] = rates = {
        "steps that are not captured": rate(JacobiDecoder(model, 1, compile="off"), sizes.length),
        **{f"{looks} steps between looks": rate(stage.captured(args, model, 1), sizes.length, looks) for looks in LOOKS},
        "Hugging Face, eager": generate_rate(model, sizes.length),
    }
    result["AR over Hugging Face, eager"] = rates[f"{CUDA_SYNC_INTERVAL} steps between looks"] / rates["Hugging Face, eager"]
    stage.publish(args, "speed", result)
    if not args.rehearse and time.monotonic() < until:
        rates["Hugging Face, compiled"] = generate_rate(model, sizes.length, compiled=True)
        stage.publish(args, "speed", result)


def step_costs(args: Any, model: PreTrainedModel, batch: int, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by width and number of draft tokens (medians of ROUNDS rounds in turn), and over AR's."""
    adapter = random_adapter(model, rank=sizes.rank, size=0.01)
    sides = {AR: stage.captured(args, model, 1, adapter=None)}
    for width in sizes.widths:
        sides[f"width {width}"] = stage.captured(args, model, width, adapter=None)
        sides[f"width {width}, {width - 1} drafts"] = stage.captured(args, model, width, adapter=adapter)
    running = {name: steps(decoder, batch, sizes.steps) for name, decoder in sides.items()}
    rounds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(ROUNDS):
        for name, iterations in running.items():
            start = now(model.device)
            for _ in range(sizes.steps // ROUNDS):
                next(iterations)
            rounds[name].append(1000 * (now(model.device) - start) / (sizes.steps // ROUNDS))
    medians = {name: statistics.median(times) for name, times in rounds.items()}
    return {name: {"milliseconds": median, "over AR's": median / medians[AR]} for name, median in medians.items()}


def steps(decoder: JacobiDecoder, batch: int, count: int) -> Iterator[Any]:
    """At least ``count`` iterations of rows that do not end, after those that warm up."""
    iterations = decoder.iterate([[1, 2, 3, 4 + row] for row in range(batch)], max_new_tokens=(count + WARM_UP + 2) * decoder.width)
    for _ in range(WARM_UP):
        next(iterations)
    return iterations


def waits(decoder: JacobiDecoder) -> dict[str, int]:
    """Where the device waits for the host in 32 steps without a look at the rows, by the profiler's names."""
    decoder.sync_interval = 1 << 30
    iterations = steps(decoder, 2, 32)
    now(decoder.device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA][: decoder.device.type == "cuda"]]
    with profile(activities=activities) as profiler:
        for _ in range(32):
            next(iterations)
    events = {event.key: event.count for event in profiler.key_averages()}
    return {name: count for name, count in events.items() if any(wait in name for wait in WAITS)}


def rate(decoder: JacobiDecoder, length: int, looks: int | None = None) -> float:
    """Tokens/s of one response of so many tokens, prefill included; ``looks``: steps between two looks at the row."""
    decoder.sync_interval = looks or decoder.sync_interval
    seconds = []
    for _ in range(3):
        decoder.prefixes.clear()
        start = now(decoder.device)
        (result,) = decoder.generate([[1, 2, 3, 4]], max_new_tokens=length)
        seconds.append(now(decoder.device) - start)
    return len(result.token_ids) / seconds[-1]  # the first one captures


def generate_rate(model: PreTrainedModel, length: int, compiled: bool = False) -> float | None:
    """The same by Hugging Face's ``generate``; None where it does not work compiled."""
    method = HuggingFace(model, [model.config.vocab_size - 1], compiled=compiled)
    try:
        method.decode([[1, 2, 3, 4]], length)
    except UsageError:
        return None
    start = now(model.device)
    (response,) = method.decode([[1, 2, 3, 4]], length)
    return len(response.token_ids) / (now(model.device) - start)


if __name__ == "__main__":
    main()
