"""What linear layers by oneDNN bring on a CPU (:mod:`cllm.decoding.linear`): iterations with them and with torch's own layers.

The two take turns, text by text; medians over all iterations behind the prefill.

    python scripts/benchmarks/linear.py --model MODEL --filename gsm8k_train.jsonl --output docs/results/linear.json
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import add_options, load, publish

from cllm.decoding import JacobiDecoder
from cllm.evaluation.speed import now


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(options, prompts=4)
    options.set_defaults(length=16)
    options.add_argument("--widths", type=int, nargs="+", default=[1, 2, 8, 16, 32])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = options.parse_args()
    model, _, prompts = load(args)
    result = {}
    for batch in args.batches:
        for width in args.widths:
            decoder = JacobiDecoder(model, width)
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for prompt in prompts:
                for ours in seconds:
                    with torch.backends.mkldnn.flags(enabled=ours):
                        seconds[ours] += iterations(decoder, [prompt] * batch, args.length)
            ours, own = statistics.median(seconds[True]), statistics.median(seconds[False])
            result[f"batch {batch}, width {width}"] = {
                "milliseconds, oneDNN": 1000 * ours,
                "milliseconds, torch's own": 1000 * own,
                "times faster": own / ours,
            }
            print(f"batch {batch}, width {width}: {result[f'batch {batch}, width {width}']}", flush=True)
    publish(args, model, result)


def iterations(decoder: JacobiDecoder, prompts: list[list[int]], count: int) -> list[float]:
    """Seconds of each iteration behind the prefill."""
    running, seconds = decoder.iterate(prompts, max_new_tokens=(count + 1) * decoder.width), []
    next(running)
    for _ in range(count):
        start = now(decoder.device)
        if next(running, None) is None:
            break
        seconds.append(now(decoder.device) - start)
    running.close()
    return seconds


if __name__ == "__main__":
    main()
