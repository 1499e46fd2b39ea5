"""Does the text equal that of AR decoding? Three parts, each with its own result file.

tiny: 1,000 generated cases in float32 (six architectures, every guess and combination, both windows, ragged batches, rows that
join and leave) against Hugging Face's generate. With ``--lossless`` every case drafts with a random adapter. With ``--prefixes``
prompts share prefixes with each other and with earlier texts of their decoder, whose prefix cache has budgets from zero to
unlimited.
``--compile MODE`` decodes with compiled or captured steps. Since compiling takes longer than a case, ``--share N`` consecutive
cases then share a decoder. ``--compile rehearsal`` needs no GPU: it keeps steps and reruns them on fixed buffers as captured
ones are, but not as CUDA graphs.

    python scripts/benchmarks/exactness.py tiny --output docs/results/exactness_tiny.json
    python scripts/benchmarks/exactness.py tiny --compile compile --share 125 --output docs/results/exactness_compiled.json
    python scripts/benchmarks/exactness.py tiny --compile rehearsal --share 10 --output docs/results/exactness_rehearsal.json
    python scripts/benchmarks/exactness.py tiny --lossless --output docs/results/exactness_lossless.json
    python scripts/benchmarks/exactness.py tiny --prefixes --share 10 --output docs/results/exactness_prefixes.json

real: prompts of several datasets in float32, every guess in a queue and the paper's window, against Hugging Face's generate.
A model with a consistency adapter drafts with it, at the widths that ``cllm tune`` stored or at --width.

    python scripts/benchmarks/exactness.py real --model MODEL --data gsm8k=FILE code_search_net=FILE sharegpt=FILE \\
        --prompts 34 --length 64 --output docs/results/exactness_real.json

bfloat16: how often per 1,000 tokens a text departs from AR decoding's, and by what logit margin; for comparison, how often the
text of Hugging Face's generate in batches of 8 departs from its text prompt by prompt.

    python scripts/benchmarks/exactness.py bfloat16 --model MODEL --data gsm8k=FILE --prompts 32 --length 64 \\
        --output docs/results/exactness_bfloat16.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import add_output, encode, parser, publish
from tqdm import tqdm

from cllm.adapter import attached
from cllm.decoding import JacobiDecoder, Queue, Request
from cllm.decoding.runner import CapturingRunner, CompiledStep
from cllm.evaluation.choice import CANDIDATES, lossless_candidates
from cllm.evaluation.method import HuggingFace
from cllm.evaluation.speed import divergence
from cllm.models import load_model, load_tokenizer, read_record, stop_token_ids

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the tests' tiny models and cases

BATCH = 8
REHEARSAL = "rehearsal"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("part", choices=PARTS)
    options.add_argument("--cases", type=int, default=1000, help="tiny: number of cases")
    options.add_argument("--share", type=int, default=1, help="tiny: cases per decoder")
    options.add_argument("--lossless", action="store_true", help="tiny: draft with a random adapter in every case")
    options.add_argument("--prefixes", action="store_true", help="tiny: prompts that share prefixes")
    options.add_argument("--compile", default="auto", help="tiny, real: how the decoder runs steps")
    options.add_argument("--model")
    options.add_argument("--device")
    options.add_argument("--data", nargs="+", metavar="TASK=FILE", default=[])
    options.add_argument("--prompts", type=int, default=34, help="prompts per file")
    options.add_argument("--length", type=int, default=64, help="new tokens per response")
    options.add_argument("--width", type=int, default=8)
    add_output(options)
    args = options.parse_args()
    if args.part != "tiny" and not (args.model and args.data):
        options.error(f"{args.part} needs --model and --data")
    PARTS[args.part](args)


def tiny(args: argparse.Namespace) -> None:
    from cases import draw_case, draw_drafts, follow, reusing

    wrong, rows, tokens, reused, gave_up = [], 0, 0, 0, 0
    for number in tqdm(range(args.cases)):
        if number % args.share == 0:
            torch.compiler.reset()
            first = draw_case(number, **(draw_drafts(number) if args.lossless else {}))
            mode, texts = "off" if args.compile == REHEARSAL else args.compile, list[list[int]]()
            decoder = reusing(first, number // args.share, compile=mode) if args.prefixes else first.decoder(compile=mode)
            if args.compile == REHEARSAL:
                decoder.runner = CapturingRunner(decoder.step, lambda step: step)
        case = draw_case(number, **first.setting)
        if args.prefixes:
            case = follow(case, texts, number)
        expected, results = case.expected(), case.results(decoder)
        got = [result.token_ids for result in results]
        reused += sum(result.reused for result in results)
        texts += [[*request.prompt, *text] for request, text in zip(case.requests, expected)]
        step = decoder.runner.step
        gave_up += isinstance(step, CompiledStep) and step.compiled is step.plain
        rows, tokens = rows + len(got), tokens + sum(map(len, expected))
        if got != expected:
            wrong.append({"case": number, "kind": case.kind, "guess": case.guess, "window": case.window})
            tqdm.write(f"different: {wrong[-1]}")
    result = {"cases": args.cases, "texts": rows, "tokens": tokens, "different": len(wrong), "where": wrong}
    publish(args, case.model, result | {"prompt tokens reused": reused, "cases after compiling failed": gave_up})


def real(args: argparse.Namespace) -> None:
    model, stops, prompts = load(args, "float32")
    expected = hugging_face(model, stops, prompts, args.length, 1)
    lossless = attached(model) is not None
    guesses = lossless_candidates(read_record(model.config)) if lossless else CANDIDATES
    ways = [(guess, "sliding") for guess in guesses] + [("context", "block")] * (not lossless)
    result: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(map(len, expected)), "ways": {}}
    for guess, window in ways:
        way = {"guess": guess, "window": window, "compile": args.compile}
        got = ours(model, stops, prompts, args.length, BATCH, args.width, **way)
        result["ways"][f"{window}, {guess}"] = found = departures(model, prompts, expected, got)
        print(f"{window}, {guess}: {found['texts that depart']} of {len(prompts)} texts depart from AR decoding", flush=True)
    publish(args, model, result)


def bfloat16(args: argparse.Namespace) -> None:
    model, stops, prompts = load(args, "bfloat16")
    alone = hugging_face(model, stops, prompts, args.length, 1)
    sides = {f"HF generate, batch {BATCH}, from batch 1": (alone, hugging_face(model, stops, prompts, args.length, BATCH))}
    ar = ours(model, stops, prompts, args.length, 1, 1)
    sides["our AR from HF generate, both at batch 1"] = (alone, ar)
    for guess in (CANDIDATES[0], CANDIDATES[-1]):  # rounding depends on the width, hardly on the guesses
        got = ours(model, stops, prompts, args.length, 1, args.width, guess=guess)
        sides[f"Jacobi {args.width}, {guess}, from our AR, both at batch 1"] = (ar, got)
    result: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(map(len, alone)), "sides": {}}
    for name, (expected, got) in sides.items():
        result["sides"][name] = found = departures(model, prompts, expected, got)
        print(f"{name}: {found}", flush=True)
    publish(args, model, result)


def load(args: argparse.Namespace, dtype: str) -> tuple[Any, list[int], list[list[int]]]:
    """Model, stop ids, and the prompts of all files."""
    model, tokenizer = load_model(args.model, dtype=dtype, device=args.device), load_tokenizer(args.model)
    pairs = [word.partition("=")[::2] for word in args.data]
    prompts = [ids for task, file in pairs for ids in encode(model, tokenizer, task, file or None, args.prompts)]
    return model, stop_token_ids(model, tokenizer), prompts


def hugging_face(model: Any, stops: list[int], prompts: list, length: int, batch: int) -> list[list[int]]:
    method = HuggingFace(model, stops)
    return [response.token_ids for part in parts(prompts, batch) for response in method.decode(part, length)]


def ours(model: Any, stops: list[int], prompts: list, length: int, batch: int, width: int, **way: Any) -> list[list[int]]:
    queue = Queue(JacobiDecoder(model, width, eos_token_ids=stops, **way), batch)
    found = dict(tqdm(queue.run(Request(ids, length) for ids in prompts), total=len(prompts), desc=f"{width} {way}"))
    return [found[number].token_ids for number in range(len(prompts))]


def parts(prompts: list, size: int) -> Iterator[list]:
    for at in tqdm(range(0, len(prompts), size), desc=f"HF generate, batch {size}"):
        yield prompts[at : at + size]


def departures(model: Any, prompts: Sequence, expected: Sequence, got: Sequence) -> dict[str, Any]:
    """Where texts depart from the expected ones: first divergences per 1,000 tokens up to there, and the logit margins."""
    found = [divergence(model, *texts) for texts in zip(prompts, expected, got, strict=True)]
    departed = [where for where in found if where]
    tokens = sum(where["token"] + 1 if where else len(text) for where, text in zip(found, expected))
    known = [where for where in departed if where["margin"] is not None]  # None where one text ends and the other continues
    margins = [where["margin"] for where in known]
    return {
        "texts that depart": len(departed),
        "tokens compared": tokens,
        "departures per 1,000 tokens": 1000 * len(departed) / tokens,
        "median margin, logits": statistics.median(margins) if margins else None,
        "largest margin, logits": max(margins, default=None),
        "largest margin, spacings of the dtype": max((where["margin_ulps"] for where in known), default=None),
    }


PARTS = {"tiny": tiny, "real": real, "bfloat16": bfloat16}

if __name__ == "__main__":
    main()
