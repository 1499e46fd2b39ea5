"""Decoding speed of all methods in one run, alternating batch by batch on the same prompts and token budget.

Methods: ours at every width with every guess and at width 1 (AR); Hugging Face's generate, eager and compiled with a static
cache (on a GPU, or with --compile); its prompt lookup and the paper's plain Jacobi decoding (both at batch 1 only). On a CPU,
Hugging Face's methods also run with our linear layers and attention, which compares the algorithms alone. For ours, the time
of an iteration is also compared with that of a bare forward of the same shape. Writes a table per cell, one JSON, one picture.

    python scripts/benchmarks/decode.py --model CLLM --task spider --filename quickstart/data --prompts 48 --widths 4 8 16 \\
        --batches 1 2 4 8 16 --most_tokens 2048 --rounds 3 --guess context prompt_lookup+pool --output docs/results/decode.json
    python scripts/benchmarks/decode.py --model MODEL --task copying --contexts 0 --output docs/results/decode_copying.json
    python scripts/benchmarks/decode.py --model MODEL --filename gsm8k_train.jsonl --dtype bfloat16 --batches 1 2 4 8 16 \\
        --widths 4 8 16 32 64 --contexts 128 512 2048 4096 --length 128 --output docs/results/decode_gpu.json   # on a GPU
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from common import joined, load, model_parser, peak_memory, publish, race

from cllm import reference
from cllm.decoding import JacobiDecoder
from cllm.decoding.grouped_attention import AttentionPatch
from cllm.decoding.linear import LinearPatch
from cllm.evaluation.choice import CANDIDATES
from cllm.evaluation.interval import ratio_interval
from cllm.evaluation.method import Engine, HuggingFace, Method, Response
from cllm.evaluation.method_name import AR, GENERATE, JACOBI, PROMPT_LOOKUP
from cllm.evaluation.speed import Measurement, measure, summarise
from cllm.evaluation.table import format_table, number, with_interval
from cllm.models import context_length, stop_token_ids

PAPER, COMPILED, ONEDNN = "paper", "generate_compiled", "onednn"
RACED = 12  # iterations timed against a bare forward


def main() -> None:
    options = model_parser(__doc__, prompts=8)
    options.set_defaults(length=32)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    options.add_argument("--widths", type=int, nargs="+", default=[4, 16])
    options.add_argument("--contexts", type=int, nargs="+", default=[128, 512], help="tokens per prompt; 0: unchanged")
    options.add_argument("--most_tokens", type=int, help="leave out batches with more prompt tokens than this")
    options.add_argument("--guess", nargs="+", default=CANDIDATES)
    options.add_argument("--rounds", type=int, default=2, help="prompt batches per cell")
    options.add_argument("--compile", action="store_true", help="include Hugging Face's compiled generate on a CPU")
    args = options.parse_args()
    model, tokenizer, prompts = load(args)
    stops, most = stop_token_ids(model, tokenizer), context_length(model.config)
    args.compile |= model.device.type == "cuda"
    cells: list[dict[str, Any]] = []
    for context in args.contexts:
        for batch in args.batches:
            if most is not None and context + max(args.length, (RACED + 3) * max(args.widths)) > most:
                print(f"left out: context {context}, since the model has {most} positions")
                continue
            if args.most_tokens is not None and context * batch > args.most_tokens:
                continue
            batches = joined(prompts, context, batch, args.rounds)
            methods = [MemoryMeasured(method) for method in all_methods(args, model, stops, batch)]
            cells.append({"context": context, "batch": batch, "methods": cell(methods, batches, args)})
            print(f"\ncontext {context}, batch {batch}\n{table(cells[-1]['methods'])}", flush=True)
            publish(args, model, {"cells": cells})  # after each cell, so that an interruption loses little
            if args.output:
                draw(cells, Path(args.output).with_suffix(".png"))


def all_methods(args: argparse.Namespace, model: Any, stops: list[int], batch: int) -> list[Method]:
    ar = JacobiDecoder(model, 1, eos_token_ids=stops, prefix_cache=0)  # like Hugging Face's, without prefix reuse
    methods: list[Method] = [Engine(ar, AR, "ours, AR"), HuggingFace(model, stops)]
    if args.compile:
        methods.append(named(HuggingFace(model, stops, compiled=True), COMPILED))
    for width in args.widths:
        for guess in args.guess:
            decoder = JacobiDecoder(model, width, eos_token_ids=stops, guess=guess, prefix_cache=0)
            methods.append(Engine(decoder, f"{JACOBI}:{width}:{guess}", f"ours {width}, {guess}"))
        if batch == 1:
            methods.append(named(HuggingFace(model, stops, lookup=max(1, width - 1)), f"{PROMPT_LOOKUP}:{width}"))
            methods.append(Paper(model, stops, width))
    if model.device.type == "cpu":
        methods += [OurLayers(method) for method in methods if isinstance(method, HuggingFace) and not method.compiled]
    return methods


class OurLayers:
    """A method of Hugging Face's with our decoder's linear layers and attention."""

    def __init__(self, method: HuggingFace) -> None:
        self.method = method
        self.name, self.label = f"{method.name}:{ONEDNN}", f"{method.label}, our layers"
        self.model, self.one_by_one = method.model, method.one_by_one

    def decode(self, prompts, max_new_tokens: int) -> list[Response]:
        with LinearPatch.refreshed(self.model), AttentionPatch.for_model(self.model):
            return self.method.decode(prompts, max_new_tokens)


def named(method: HuggingFace, name: str) -> HuggingFace:
    method.name = name
    return method


class Paper:
    """Plain Jacobi decoding, block by block, see :func:`cllm.reference.decode`."""

    one_by_one = True

    def __init__(self, model: Any, stops: list[int], block: int) -> None:
        self.model, self.stops, self.block, self.draw = model, stops, block, random.Random(0)
        self.name, self.label = f"{PAPER}:{block}", f"paper's Jacobi {block}"

    def decode(self, prompts, max_new_tokens: int) -> list[Response]:
        found = reference.decode(self.model, prompts[0], self.block, max_new_tokens, self.guess, self.stops)
        return [Response(*found)]

    def guess(self, prefix, size: int) -> list[int]:
        return self.draw.choices(prefix, k=size)


class MemoryMeasured:
    """A method with its peak memory over the first batch, on a GPU without the memory that earlier methods hold."""

    def __init__(self, method: Method) -> None:
        self.method, self.peak = method, 0
        self.name, self.label, self.model, self.one_by_one = method.name, method.label, method.model, method.one_by_one

    def decode(self, prompts, max_new_tokens: int) -> list[Response]:
        device = self.model.device
        others = torch.cuda.memory_allocated(device) - self.model.get_memory_footprint() if device.type == "cuda" else 0
        with peak_memory(device) as peak:
            responses = self.method.decode(prompts, max_new_tokens)
        self.peak = self.peak or max(peak, default=0) - others
        return responses


def cell(methods: list[MemoryMeasured], batches: list, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of every method at one batch size and context length."""
    for method in methods if args.compile else ():
        method.decode(batches[0], args.length)  # compile and capture for this length before timing
    measured = measure(methods, batches, args.length)
    figures = summarise(measured)
    for method in methods:
        figures[method.name] |= {
            "label": method.label,
            "tokens_per_second_interval": rate_interval(measured, method.name),
            "peak_bytes": method.peak or None,
        } | iteration_cost(method.method, batches[0])
    return figures


def rate_interval(measured: Measurement, name: str) -> Any:
    runs = measured.runs[name]
    return ratio_interval([sum(len(r.token_ids) for r in run.responses) for run in runs], [run.seconds for run in runs])


def iteration_cost(method: Method, batch: list[list[int]]) -> dict[str, float]:
    """Median milliseconds of our iterations and of bare forwards, and their ratio."""
    if not isinstance(method, Engine):
        return {}
    endless = JacobiDecoder(method.model, method.decoder.width, guess=method.decoder.guess)
    ours, bare = (statistics.median(times) for times in zip(*race(endless, batch[0], len(batch), RACED)))
    return {"iteration_ms": 1000 * ours, "bare_forward_ms": 1000 * bare, "iteration_over_bare": ours / bare}


def table(methods: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            figures["label"],
            with_interval(figures["tokens_per_second"], figures["tokens_per_second_interval"], 1),
            number(figures["speedup"]),
            with_interval(figures["tokens_per_forward"], figures["tokens_per_forward_interval"]),
            number(figures.get("iteration_over_bare")),
            number(figures["peak_bytes"] and figures["peak_bytes"] / 2**30),
            number(figures["same_as_ar"]),
        ]
        for figures in methods.values()
    ]
    header = ["method", "tokens/s", "over\nour AR", "tokens per\nforward", "iteration\nover bare", "peak\nGiB", "same\nas AR"]
    return format_table(header, rows)


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Plot tokens/s over batch size, one panel per context length; of several widths the fastest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contexts = list(dict.fromkeys(cell["context"] for cell in cells))
    figure, axes = plt.subplots(1, len(contexts), figsize=(5 * len(contexts), 5), layout="constrained", squeeze=False)
    for context, axis in zip(contexts, axes[0]):
        lines: dict[str, dict[int, float]] = {}
        for cell in (c for c in cells if c["context"] == context):
            for name, figures in cell["methods"].items():
                line = lines.setdefault(line_name(name), {})
                line[cell["batch"]] = max(line.get(cell["batch"], 0.0), figures["tokens_per_second"])
        for name, line in lines.items():
            axis.plot(*zip(*line.items()), marker="o", label=name, linestyle="-" if name.startswith("ours") else "--")
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel="tokens/s", title=f"context {context}")
        axis.set_xticks(sorted({cell["batch"] for cell in cells}), labels=sorted({cell["batch"] for cell in cells}))
    axes[0][0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def line_name(method: str) -> str:
    kind, *rest = method.split(":")
    titles = {AR: "ours, AR", GENERATE: "HF generate", COMPILED: "HF generate, compiled", PROMPT_LOOKUP: "HF prompt lookup"}
    title = f"ours, {rest[-1]}" if kind == JACOBI else titles.get(kind, "paper's Jacobi")
    return f"{title}, our layers" if ONEDNN in rest else title


if __name__ == "__main__":
    main()
