"""The gain from prefix reuse, and its cost where prompts share nothing: the same decoder with and without it, alternating.

    python scripts/benchmarks/prefix.py --model MODEL --filename SPIDER --output docs/results/prefix.json

SPIDER is a Spider folder such as scripts/sql_questions.py writes. There are four parts: the second turn of a conversation, up to
its first tokens; questions about one database, one batch after another; several samples of one prompt in a batch; and the questions
again, each with a different first token.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from common import Forwarded, encode_messages, joined, load_both, model_parser, publish
from tqdm import tqdm

from cllm.decoding import GREEDY, JacobiDecoder, Sampling
from cllm.decoding.result import Tally
from cllm.evaluation.speed import now
from cllm.models import stop_token_ids
from cllm.tasks import get_task
from cllm.tasks.source import load_examples

ON, OFF = "with reuse", "without"
PARTS = ("second turn", "questions about one database", "samples of one prompt", "nothing shared")


def main() -> None:
    options = model_parser(__doc__, prompts=60)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    options.add_argument("--batch_size", type=int, default=1, help="questions about one database that are asked together")
    options.add_argument("--conversation", type=int, default=1500, help="tokens of the conversation including the second question")
    options.add_argument("--question", type=int, default=24, help="tokens of the second question")
    options.add_argument("--samples", type=int, default=8)
    options.add_argument("--sampled", type=int, default=500, help="tokens of the prompt to sample from")
    options.add_argument("--rounds", type=int, default=5, help="number of conversations, and of sets of samples")
    options.set_defaults(task="spider", block_size=None)
    args = options.parse_args()
    model, tokenizer = load_both(args)
    prompts = encode_messages(model, tokenizer, args.task, one_database(args))
    stops = stop_token_ids(model, tokenizer)
    race = Race({side: JacobiDecoder(model, args.block_size, eos_token_ids=stops, **SIDES[side]) for side in SIDES}, args)
    unshared = [[at + 1, *prompt[1:]] for at, prompt in enumerate(prompts)]
    measures = (
        lambda: race.second_turn(prompts),
        lambda: race.questions(prompts),
        lambda: race.samples(prompts),
        lambda: race.questions(unshared),
    )
    result = {part: measure() for part, measure in zip(PARTS, measures, strict=True) if part in args.parts}
    for part, figures in result.items():
        print(f"{part}: {figures}")
    publish(args, model, result)


SIDES: dict[str, dict[str, Any]] = {ON: {}, OFF: {"prefix_cache": 0}}


def one_database(args: argparse.Namespace) -> Sequence[Sequence[Any]]:
    """The questions about the database with the most, in the file's order."""
    examples = list(load_examples(get_task(args.task), args.filename, "test"))
    (database, _), *_ = Counter(example.target["db_id"] for example in examples).most_common(1)
    return [example.messages for example in examples if example.target["db_id"] == database][: args.prompts]


class Race:
    """Two decoders that alternate, each starting every part of the benchmark with an empty prefix cache."""

    def __init__(self, decoders: dict[str, JacobiDecoder], args: argparse.Namespace) -> None:
        self.decoders, self.args = decoders, args

    def second_turn(self, prompts: list[list[int]]) -> dict[str, Any]:
        args, lengths = self.args, list[int]()
        texts = joined(prompts, args.conversation - args.length - args.question, 1, args.rounds)
        questions = [text for (text,) in joined(prompts[::-1], args.question, 1, args.rounds)]
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for (text,), question in zip(texts, questions):
            for side in self._turns(len(lengths)):
                decoder = self.decoders[side]
                decoder.prefixes.clear()
                (reply,) = answer(decoder, [text], args.length).texts
                seconds[side].append(answer(decoder, [[*text, *reply, *question]], 1).prefill)
            lengths.append(len(text) + len(reply) + len(question))
        return {"tokens": statistics.mean(lengths)} | _compared("seconds to the first tokens", seconds)

    def questions(self, prompts: list[list[int]]) -> dict[str, Any]:
        answers: dict[str, list[Answer]] = {side: [] for side in SIDES}
        self._clear()
        size = self.args.batch_size
        for at, batch in enumerate(tqdm([prompts[start : start + size] for start in range(0, len(prompts), size)])):
            for side in self._turns(at):
                answers[side].append(answer(self.decoders[side], batch, self.args.length))
        texts = ([text for each in answers[side] for text in each.texts] for side in SIDES)
        beyond = {side: [sum(each.prefill - each.iteration for each in answers[side])] for side in SIDES}
        return (
            {"tokens": sum(map(len, prompts)), "texts that differ": sum(one != other for one, other in zip(*texts))}
            | _compared("seconds of prefill", {side: [each.prefill for each in answers[side]] for side in SIDES})
            | _compared("seconds of prefill beyond an iteration", beyond)
            | _compared("seconds", {side: [each.total for each in answers[side]] for side in SIDES})
        )

    def samples(self, prompts: list[list[int]]) -> dict[str, Any]:
        args, count = self.args, self.args.samples
        samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(count)]
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        forwarded_tokens: dict[str, int] = {}
        for at, (text,) in enumerate(joined(prompts, args.sampled, 1, args.rounds)):
            for side in self._turns(at):
                decoder = self.decoders[side]
                decoder.prefixes.clear()
                with Forwarded(decoder.model) as forwarded:
                    seconds[side].append(answer(decoder, [text] * count, 1, samplings).prefill)
                forwarded_tokens[side] = forwarded.tokens
        counted = {f"tokens through the model, {side}": tokens for side, tokens in forwarded_tokens.items()}
        return counted | {"of which windows": count * decoder.width} | _compared("seconds of prefill", seconds)

    def _turns(self, at: int) -> Iterator[str]:
        yield from [*SIDES] if at % 2 else [*SIDES][::-1]

    def _clear(self) -> None:
        for decoder in self.decoders.values():
            decoder.prefixes.clear()


class Answer(NamedTuple):
    """Texts, and the seconds that they took."""

    prefill: float  # of the first iteration, whose forward has the prompts and the first windows
    iteration: float  # median of the later ones; 0.0 without any
    total: float
    texts: list[list[int]]


def answer(decoder: JacobiDecoder, prompts: Sequence[Sequence[int]], length: int, sampling: Sampling | list[Sampling] = GREEDY) -> Answer:
    times, tally = [now(decoder.device)], Tally(decoder.eos_ids.tolist())
    for iteration in decoder.iterate(prompts, max_new_tokens=length, sampling=sampling):
        tally.add(iteration)
        times.append(now(decoder.device))
    prefill, *later = (end - start for start, end in pairwise(times))
    texts = [tally.take(row, length).token_ids for row in range(len(prompts))]
    return Answer(prefill, statistics.median(later or [0.0]), times[-1] - times[0], texts)


def _compared(what: str, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Total seconds of both sides, their ratio, and the median ratio."""
    on, off = sum(seconds[ON]), sum(seconds[OFF])
    shares = [one / other for one, other in zip(seconds[ON], seconds[OFF])]
    return {
        f"{what}, {ON}": on,
        f"{what}, {OFF}": off,
        f"{what}, times shorter": off / on,
        f"{what}, share": on / off,
        f"{what}, median share": statistics.median(shares),
    }


if __name__ == "__main__":
    main()
