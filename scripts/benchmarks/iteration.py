"""The engine's time per iteration over that of a bare forward of the same tokens over a cache of the same length.

The two take turns, iteration by iteration, see ``common.race``.

    python scripts/benchmarks/iteration.py --model MODEL --filename gsm8k_train.jsonl --output iteration.json
"""

from __future__ import annotations

import argparse
import statistics

from common import add_options, load, publish, race

from cllm.decoding import JacobiDecoder


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(options, prompts=3)
    options.add_argument("--widths", type=int, nargs="+", default=[1, 8, 16, 32])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    args = options.parse_args()
    model, _, prompts = load(args)
    result = {}
    for batch in args.batches:
        for width in args.widths:
            pairs = [pair for prompt in prompts for pair in race(JacobiDecoder(model, width), prompt, batch, args.length)]
            ours, bare = (statistics.median(times) for times in zip(*pairs))
            result[f"batch {batch}, width {width}"] = {
                "iterations": len(pairs),
                "milliseconds, engine": 1000 * ours,
                "milliseconds, bare forward": 1000 * bare,
                "ratio of medians": ours / bare,
                "ratio of sums": sum(a for a, _ in pairs) / sum(b for _, b in pairs),
            }
            print(f"batch {batch}, width {width}: {result[f'batch {batch}, width {width}']}", flush=True)
    publish(args, model, result)


if __name__ == "__main__":
    main()
