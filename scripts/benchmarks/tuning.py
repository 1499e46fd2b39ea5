"""How close ``cllm tune`` comes to the optimum: its pick against an exhaustive sweep, on the same device in one run.

The pick is made on the first half of the prompts. Then every pair of width and guess decodes the others end to end, alternating
round by round. The ratio is the tokens/s of the pick over those of the fastest.

    python scripts/benchmarks/tuning.py --model CLLM --task spider --filename quickstart/data --output docs/results/tuning.json
"""

from __future__ import annotations

from typing import Any

from common import load, model_parser, publish
from tqdm import tqdm

from cllm.decoding import JacobiDecoder
from cllm.evaluation.choice import CANDIDATES, fastest, measure_choices
from cllm.evaluation.interval import bootstrap
from cllm.evaluation.method import Engine
from cllm.evaluation.method_name import AR
from cllm.evaluation.speed import Measurement, measure, summarise
from cllm.models import stop_token_ids


def main() -> None:
    options = model_parser(__doc__, prompts=16)
    options.set_defaults(length=64)
    options.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 6, 8, 12, 16, 24, 32])
    options.add_argument("--guess", nargs="+", default=CANDIDATES)
    options.add_argument("--rounds", type=int, default=2)
    args = options.parse_args()
    model, tokenizer, prompts = load(args)
    stops, half = stop_token_ids(model, tokenizer), max(1, len(prompts) // 2)
    measured = measure_choices(
        model, prompts[:half], args.widths, args.guess, [1], max_new_tokens=args.length, eos_ids=stops, progress=tqdm
    )
    best = fastest(measured, 1)
    methods = [Engine(JacobiDecoder(model, 1, eos_token_ids=stops, prefix_cache=0), AR, AR)]
    for choice in measured:
        decoder = JacobiDecoder(model, choice.width, eos_token_ids=stops, guess=choice.guess, prefix_cache=0)
        methods.append(Engine(decoder, name(choice), name(choice)))
    swept = measure(methods, [[ids] for ids in prompts[half:] * args.rounds], args.length, progress=tqdm)
    figures = {key: summary["tokens_per_second"] for key, summary in summarise(swept).items() if key != AR}
    fast = max(figures, key=lambda key: figures[key])
    result = {
        "tune picks": name(best),
        "fastest in the sweep": fast,
        "tokens/s of the pick": figures[name(best)],
        "tokens/s of the fastest": figures[fast],
        "pick over fastest": figures[name(best)] / figures[fast],
        "its interval": ratio(swept, name(best), fast),
        "sweep, tokens/s": figures,
        "tune's estimates, tokens/s": {name(m): m.tokens_per_second for m in measured},
    }
    publish(args, model, result)


def name(choice: Any) -> str:
    return f"{choice.width} {choice.guess}"


def ratio(swept: Measurement, pick: str, fast: str) -> list[float] | None:
    """95% bootstrap interval over texts. Both sides write the same texts, so tokens cancel."""
    seconds = [[run.seconds for run in swept.runs[method]] for method in (fast, pick)]
    interval = bootstrap(seconds, lambda sums: sums[0] / sums[1])
    return list(interval) if interval else None


if __name__ == "__main__":
    main()
