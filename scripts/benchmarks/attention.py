"""The gain from attention without copies of the cache (:mod:`cllm.decoding.grouped_attention`): iterations with and without it.

The two alternate text by text; medians over all iterations after the prefill. Only models with GQA can gain.

    python scripts/benchmarks/attention.py --model MODEL --filename gsm8k_train.jsonl --context 2048 --output attention.json
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common import add_shapes, each_shape, joined, load, model_parser, publish, switched

from cllm.decoding import grouped_attention


def main() -> None:
    options = model_parser(__doc__, prompts=16)
    options.set_defaults(length=16)
    options.add_argument("--context", type=int, default=512, help="tokens per prompt")
    options.add_argument("--rounds", type=int, default=3, help="number of texts")
    add_shapes(options, widths=[1, 4, 16], batches=[1, 4])
    args = options.parse_args()
    model, _, prompts = load(args)

    def figures(batch: int, width: int) -> dict[str, float]:
        return switched(model, width, joined(prompts, args.context, batch, args.rounds), args.length, grouped)

    publish(args, model, each_shape(args, figures))


@contextmanager
def grouped(on: bool) -> Iterator[None]:
    most = grouped_attention.MOST_QUERIES
    grouped_attention.MOST_QUERIES = most if on else 0
    try:
        yield
    finally:
        grouped_attention.MOST_QUERIES = most


if __name__ == "__main__":
    main()
