"""The engine's overhead: time of an iteration over that of a bare forward of the same tokens with a cache of the same length.

The two alternate iteration by iteration (``common.race``). With ``--rank`` a random adapter of that rank drafts on all guesses
of the window, and a third forward without the adapter shows the adapter's cost.

    python scripts/benchmarks/iteration.py --model MODEL --filename gsm8k_train.jsonl --output iteration.json
    python scripts/benchmarks/iteration.py --model MODEL --filename gsm8k_train.jsonl --rank 128 --widths 4 8 16 \\
        --output lossless_iteration.json
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from common import add_shapes, each_shape, load, model_parser, publish, race

from cllm.adapter import attach
from cllm.decoding import JacobiDecoder
from cllm.training.lora import AdapterArguments

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the tests' random adapter


def main() -> None:
    from tiny import random_adapter

    options = model_parser(__doc__, prompts=3)
    add_shapes(options, widths=[1, 8, 16, 32], batches=[1, 4])
    options.add_argument("--rank", type=int, default=0, help="rank of a random adapter; 0: no adapter")
    options.add_argument("--modules", nargs="+", default=[], help="names of its layers; default: those of `cllm train --lossless`")
    args = options.parse_args()
    model, _, prompts = load(args)
    if args.rank:
        modules = AdapterArguments(lora_r=args.rank, lora_target_modules=args.modules).target_modules(model)
        attach(model, random_adapter(model, rank=args.rank, size=0.01, modules=modules))

    def figures(batch: int, width: int) -> dict[str, float]:
        raced = [times for prompt in prompts for times in race(JacobiDecoder(model, width), prompt, batch, args.length)]
        ours, bare, *plain = (statistics.median(times) for times in zip(*raced))
        result = {
            "iterations": len(raced),
            "milliseconds, engine": 1000 * ours,
            "milliseconds, bare forward": 1000 * bare,
            "ratio of medians": ours / bare,
            "ratio of sums": sum(times[0] for times in raced) / sum(times[1] for times in raced),
        }
        if plain:
            result |= {"milliseconds, without the adapter": 1000 * plain[0], "ratio with it": bare / plain[0]}
        return result

    publish(args, model, each_shape(args, figures))


if __name__ == "__main__":
    main()
