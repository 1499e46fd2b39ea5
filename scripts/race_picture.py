"""An animated picture of AR and Jacobi decoding side by side, from a prompt that `cllm speedup` measured at batch size 1.

python scripts/race_picture.py docs/results/quickstart/cllm.json --prompt spider-test-21 --tokenizer quickstart/target \\
    --question "How many orders of pet products came from London?" \\
    --title "SmolLM2-135M on two CPU cores" --output docs/images/race.svg

The times of the prefill and of the whole response are the measured ones; the forwards after the prefill are spaced evenly. A
result file does not distinguish stationary tokens from other fast-forwarded ones. `cllm demo --record` draws a new race.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm.cli.command import command
from cllm.errors import UsageError
from cllm.models import load_tokenizer
from cllm.serving.demo.picture import TITLES, animate
from cllm.serving.demo.race import Gained, Method, Step
from cllm.serving.text import TextStream


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("result", metavar="RESULT", type=Path, help="a JSON file of cllm speedup --batch_size 1")
    options.add_argument("--prompt", required=True, help="id of a prompt in the file")
    options.add_argument("--question", required=True, help="the prompt's text to show")
    options.add_argument("--tokenizer", required=True, help="checkpoint folder or hub name")
    options.add_argument("--title", required=True)
    options.add_argument("--output", required=True, type=Path, metavar="FILE.svg")
    args = options.parse_args(argv)
    result = json.loads(args.result.read_text(encoding="utf-8"))
    found = steps(result, args.prompt, load_tokenizer(args.tokenizer))
    args.output.write_text(animate(found, args.question, args.title), encoding="utf-8")


def steps(result: Mapping[str, Any], prompt_id: str, tokenizer: Any) -> list[Step]:
    """The forwards of both methods on one prompt. Raises UsageError if the result file does not determine them."""
    row = next((row for row in result["prompts"] if row["id"] == prompt_id), None)
    if row is None:
        raise UsageError(f"no prompt {prompt_id!r} in the result file")
    if result["settings"]["batch_size"] != 1:
        raise UsageError(f"batch_size must be 1, since times are measured per batch, got {result['settings']['batch_size']}")
    tokens = row["methods"]["ar"]["tokens"]
    ids = tokenizer(row["responses"]["jacobi"], add_special_tokens=False).input_ids
    ids += result["settings"]["eos_token_ids"][: tokens - len(ids)]
    if len(ids) != tokens:
        raise UsageError(f"the response of {prompt_id} has {tokens} tokens, and {len(ids)} with this tokenizer")
    timed = result["batches"][row["batch"]]
    return [
        step for method in TITLES for step in _steps(method, row["methods"][method]["accepted"], timed[method], ids, TextStream(tokenizer))
    ]


def _steps(method: Method, accepted: Sequence[int], timed: Mapping[str, float], ids: Sequence[int], text: TextStream) -> Iterator[Step]:
    end = 0
    each = (timed["seconds"] - timed["prefill_seconds"]) / max(1, len(accepted) - 1)
    for number, count in enumerate(accepted):
        new, end = ids[end : end + count], end + count
        gained = [Gained(token, text.put([token]), "fast" if at < count else "plain") for at, token in enumerate(new, 1)]
        seconds = timed["prefill_seconds"] + number * each
        yield Step(method, number + 1, seconds, [], gained, end, end == len(ids))


if __name__ == "__main__":
    main()
