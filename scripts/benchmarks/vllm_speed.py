"""Jacobi decoding inside vLLM against vLLM's own AR decoding, by batch size and width, in one run.

Each width is an engine in a process of its own; all are there from the start and take turns, batch by batch. "default" is the
checkpoint's width with the rule that gives many requests fewer drafts; the other widths are without it.

    python scripts/benchmarks/vllm_speed.py --model MODEL --task spider --filename FOLDER --output vllm_speed.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from importlib.metadata import version
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from common import add_shapes, load, model_parser, publish

from cllm.engines.vllm_server import PROPOSER
from cllm.models import default_width, read_record, stop_token_ids

AR, DEFAULT = "AR", "default"
NO_RULE = 1 << 20  # step_tokens


def main() -> None:
    options = model_parser(__doc__, prompts=32)
    add_shapes(options, widths=[4, 8, 16], batches=[1, 4, 8])
    options.add_argument("--rounds", type=int, default=3, help="how often all prompts are answered; the median counts")
    options.set_defaults(length=80)
    args = options.parse_args()
    model, tokenizer, prompts = load(args)
    engines = {AR: engine(args, 1)} | {f"width {width}": engine(args, width, step_tokens=NO_RULE) for width in args.widths}
    engines[DEFAULT] = engine(args, default_width(read_record(model.config)))
    how = {"temperature": 0, "max_tokens": args.length, "stop_token_ids": stop_token_ids(model, tokenizer)}
    result: dict[str, Any] = {"vllm": version("vllm-cpu") if model.device.type == "cpu" else version("vllm")}
    for batch in args.batches:
        seconds, texts = race(engines, prompts, batch, how, args.rounds)
        tokens = sum(map(len, texts[AR]))
        for name, times in seconds.items():
            faster = [ar / own for ar, own in zip(seconds[AR], times, strict=True)]
            result[f"batch {batch}, {name}"] = {
                "tokens/s": tokens / statistics.median(times),
                "times AR's speed": statistics.median(faster),
                "least and most": [min(faster), max(faster)],
                "texts equal": f"{sum(a == b for a, b in zip(texts[AR], texts[name], strict=True))} of {len(prompts)}",
            }
            print(f"batch {batch}, {name}: {result[f'batch {batch}, {name}']}", flush=True)
    publish(args, model, result)


def engine(args: argparse.Namespace, width: int, **rule: int) -> Any:
    """vLLM with windows of this width; 1 is AR decoding."""
    from vllm import LLM

    drafting: dict[str, Any] = {}
    if width > 1:
        speculative = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": width - 1}
        drafting = {"speculative_config": speculative, "additional_config": {"cllm": rule} if rule else {}}
    # Without prefix caching: every round answers the same prompts.
    settings = {"dtype": args.dtype, "max_num_seqs": max(args.batches), "max_model_len": 2048, "enable_prefix_caching": False}
    return LLM(args.model, **settings, **drafting)


def race(
    engines: dict[str, Any], prompts: list[list[int]], batch: int, how: dict[str, Any], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Seconds of every round, the first one left out, and the texts of the last one."""
    from vllm import SamplingParams

    seconds: dict[str, list[float]] = {name: [] for name in engines}
    texts: dict[str, list[list[int]]] = {}
    for number in range(rounds + 1):
        texts, spent = {name: [] for name in engines}, dict.fromkeys(engines, 0.0)
        for at in range(0, len(prompts), batch):
            asked = [{"prompt_token_ids": ids} for ids in prompts[at : at + batch]]
            for name, llm in engines.items():
                start = time.perf_counter()
                outputs = llm.generate(asked, SamplingParams(**how), use_tqdm=False)
                spent[name] += time.perf_counter() - start
                texts[name] += [list(output.outputs[0].token_ids) for output in outputs]
            if number == 0:  # warm-up
                break
        if number:
            for name in engines:
                seconds[name].append(spent[name])
    return seconds, texts


if __name__ == "__main__":
    main()
