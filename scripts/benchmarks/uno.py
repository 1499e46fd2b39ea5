"""Tokens per forward of a consistency adapter in UNO's two passes and in the engine's one.

Both texts are compared with AR decoding's. The adapter should have been trained with ``--guess uniform``.

    python scripts/benchmarks/uno.py --model ADAPTER --filename gsm8k_test.jsonl --block_size 8 --output uno.json
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from common import load, model_parser, publish

from cllm.adapter import attached
from cllm.decoding import JacobiDecoder
from cllm.errors import UsageError
from cllm.reference import decode_two_passes


def main() -> None:
    args = model_parser(__doc__, prompts=16).parse_args()
    model, tokenizer, prompts = load(args)
    adapter = attached(model)
    if adapter is None:
        raise UsageError(f"{args.model} has no consistency adapter")
    eos, vocabulary = [tokenizer.eos_token_id], model.config.get_text_config(decoder=True).vocab_size
    draw = random.Random(0)

    def noise(_: Sequence[int], size: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(size)]

    sides: dict[str, list[tuple[list[int], int]]] = {"ar": [], "one forward": [], "uno": []}
    for prompt in prompts:
        for name, width, drafts in (("ar", 1, 0), ("one forward", args.block_size, args.block_size - 1)):
            decoder = JacobiDecoder(model, width, drafts=drafts, guess="uniform", eos_token_ids=eos)
            (text,) = decoder.generate([prompt], max_new_tokens=args.length)
            sides[name].append((text.token_ids, text.forwards))
        sides["uno"].append(decode_two_passes(model, adapter, prompt, args.block_size, args.length, noise, eos))
    texts = {name: [text for text, _ in side] for name, side in sides.items()}
    result = {f"{name}, tokens per forward": sum(len(t) for t, _ in s) / sum(f for _, f in s) for name, s in sides.items()}
    for name in ("one forward", "uno"):
        result[f"{name}, texts equal to AR's"] = sum(a == b for a, b in zip(texts[name], texts["ar"])) / len(prompts)
    publish(args, model, result)


if __name__ == "__main__":
    main()
