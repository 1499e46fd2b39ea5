"""One training pass against the paper's, over the same responses in one run.

Forward and backward only, since the optimizer step is the same on both sides. The paper's pass takes three forwards and two
backwards per block, ours one of each per batch.

    python scripts/benchmarks/training.py --model MODEL --filename gsm8k_train.jsonl --output training.json
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

from common import Forwarded, aligned_collector, cllm_trainer, collect, load, model_parser, publish

from cllm import reference


def main() -> None:
    args = model_parser(__doc__, prompts=4).parse_args()
    model, tokenizer, prompts = load(args)
    rows, _ = collect(aligned_collector(args, model, tokenizer), prompts)
    print(f"{len(rows)} responses collected", flush=True)

    papers = dict(teacher="self", ar_loss="fixed_point", distance_decay=1.0, states_per_block=1)
    results = {}
    for name, objective in {"ours, the paper's objective": papers, "ours, default objective": {}}.items():
        results[name] = ours(args, model, tokenizer, rows, objective)
        print(f"{name}: {results[name][0]:.1f} s", flush=True)
    paper_seconds, paper_tokens = paper(model, rows)
    result = {
        "responses": len(rows),
        "seconds per response, paper": paper_seconds / len(rows),
        "token-forwards per response, paper": paper_tokens / len(rows),
    }
    for name, (seconds, tokens) in results.items():
        result[f"seconds per response, {name}"] = seconds / len(rows)
        result[f"token-forwards per response, {name}"] = tokens / len(rows)
        result[f"times faster, {name}"] = paper_seconds / seconds
    publish(args, model, result)


def ours(args, model, tokenizer, rows, objective) -> tuple[float, int]:
    """Seconds and forwarded tokens of one batch of all rows, after a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = cllm_trainer(args, model, tokenizer, rows, folder, **objective)
        data: Any = trainer.train_dataset
        batch = trainer._prepare_inputs(trainer.data_collator([data[i] for i in range(len(rows))]))
        model.train()
        trainer.compute_loss(model, batch).backward()
        model.zero_grad()
        with Forwarded(model) as student:
            start = time.perf_counter()
            trainer.compute_loss(model, batch).backward()
            seconds = time.perf_counter() - start
        model.zero_grad()
    return seconds, student.tokens


def paper(model, rows) -> tuple[float, int]:
    """Seconds and forwarded tokens of the paper's procedure over all blocks of all rows."""
    model.train()
    tokens, start = 0, time.perf_counter()
    for index, row in enumerate(rows):
        for block, (offset, _) in enumerate(row.spans()):
            states = row.trajectories[block]
            prefix = row.prompt_ids + row.response_ids[:offset]
            consistency, ar, forwarded = reference.training_losses(
                model, row.prompt_ids, row.response_ids, reference.ReferenceBlock(prefix, states), len(states) // 2
            )
            ar.backward()
            if consistency.requires_grad:
                consistency.backward()
            tokens += forwarded
        print(f"response {index}: paper's pass so far {time.perf_counter() - start:.0f} s", flush=True)
    model.zero_grad()
    return time.perf_counter() - start, tokens


if __name__ == "__main__":
    main()
