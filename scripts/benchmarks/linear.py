"""The gain from linear layers by oneDNN on a CPU (:mod:`cllm.decoding.linear`) over torch's own layers.

The two alternate text by text; medians over all iterations after the prefill.

    python scripts/benchmarks/linear.py --model MODEL --filename gsm8k_train.jsonl --output docs/results/linear.json
"""

from __future__ import annotations

import torch
from common import add_shapes, each_shape, load, model_parser, publish, switched


def main() -> None:
    options = model_parser(__doc__, prompts=4)
    options.set_defaults(length=16)
    add_shapes(options, widths=[1, 2, 8, 16, 32], batches=[1, 8])
    args = options.parse_args()
    model, _, prompts = load(args)

    def figures(batch: int, width: int) -> dict[str, float]:
        batches = [[prompt] * batch for prompt in prompts]
        return switched(model, width, batches, args.length, lambda on: torch.backends.mkldnn.flags(enabled=on))

    publish(args, model, each_shape(args, figures))


if __name__ == "__main__":
    main()
