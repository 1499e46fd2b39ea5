"""The engine's time per iteration over that of a bare forward of the same tokens over a cache of the same length.

The two take turns, iteration by iteration, see ``common.race``.

    python scripts/benchmarks/iteration.py --model MODEL --filename gsm8k_train.jsonl --output iteration.json
"""

from __future__ import annotations

import argparse
import statistics

from common import add_options, add_shapes, each_shape, load, publish, race

from cllm.decoding import JacobiDecoder


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(options, prompts=3)
    add_shapes(options, widths=[1, 8, 16, 32], batches=[1, 4])
    args = options.parse_args()
    model, _, prompts = load(args)

    def figures(batch: int, width: int) -> dict[str, float]:
        pairs = [pair for prompt in prompts for pair in race(JacobiDecoder(model, width), prompt, batch, args.length)]
        ours, bare = (statistics.median(times) for times in zip(*pairs))
        return {
            "iterations": len(pairs),
            "milliseconds, engine": 1000 * ours,
            "milliseconds, bare forward": 1000 * bare,
            "ratio of medians": ours / bare,
            "ratio of sums": sum(a for a, _ in pairs) / sum(b for _, b in pairs),
        }

    publish(args, model, each_shape(args, figures))


if __name__ == "__main__":
    main()
