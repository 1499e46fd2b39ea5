"""Random exactness cases: a tiny model, a ragged set of requests and decoding options, all drawn from one name.

``scripts/benchmarks/exactness.py`` runs a thousand, the tests a few.
"""

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from typing import Any

import torch
from tiny import KINDS, random_adapter, tiny_model
from transformers import PreTrainedModel

from cllm.adapter import Adapter
from cllm.decoding import JacobiDecoder, Queue, Request, RowResult

PARTIAL, FILLING = ("prompt_lookup", "pool"), ("context", "uniform", "filler")
FRONTS = ["+".join(order) for count in (1, 2) for order in permutations(PARTIAL, count)]
GUESSES = (*FILLING, *FRONTS, *(f"{front}+{last}" for front in FRONTS for last in FILLING))  # every valid name
VOCABULARY, MODELS = 97, 6  # tokens; random models of each kind
LONGEST = 100  # tokens that a prompt may share with an earlier text
BUDGETS = (0, 3_000, 20_000, 100_000, 1 << 30)  # bytes of the prefix cache; a token takes 384


@dataclass(frozen=True)
class Case:
    """A set of requests and how to decode it: in one batch, or ``rows`` at a time in a queue, so that rows join and leave."""

    kind: str
    seed: int
    requests: list[Request]
    rows: int
    queued: bool
    width: int
    window: Any
    guess: str
    eos: list[int]
    drafts: int  # draft tokens of a random adapter; 0: none

    @property
    def model(self) -> PreTrainedModel:
        return _model(self.kind, self.seed)

    @property
    def setting(self) -> dict[str, Any]:
        """The values that determine a decoder."""
        names = ("kind", "seed", "width", "window", "guess", "eos", "drafts")
        return {name: getattr(self, name) for name in names}

    def decoder(self, **options: Any) -> JacobiDecoder:
        return JacobiDecoder(
            self.model,
            self.width,
            eos_token_ids=self.eos,
            window=self.window,
            guess=self.guess,
            adapter=_adapter(self.kind, self.seed) if self.drafts else None,
            drafts=self.drafts,
            **options,
        )

    def decode(self, decoder: JacobiDecoder | None = None) -> list[list[int]]:
        """Our texts in the order of the requests, by ``decoder`` or a new one."""
        return [result.token_ids for result in self.results(decoder or self.decoder())]

    def results(self, decoder: JacobiDecoder) -> list[RowResult]:
        """Our results in the order of the requests."""
        if self.queued:
            found = dict(Queue(decoder, self.rows).run(iter(self.requests)))
            return [found[number] for number in range(len(self.requests))]
        return decoder.generate([r.prompt for r in self.requests], max_new_tokens=self.requests[0].max_new_tokens)

    def expected(self) -> list[list[int]]:
        """The texts of Hugging Face's greedy ``generate``, prompt by prompt."""
        return [generate(self.model, list(r.prompt), r.max_new_tokens, self.eos) for r in self.requests]


def draw_case(name: Any, **fixed: Any) -> Case:
    """The case of a name, always the same. ``fixed`` replaces drawn values."""
    draw = random.Random(f"exactness {name}")
    drawn: dict[str, Any] = {
        "kind": draw.choice(KINDS),
        "seed": draw.randrange(MODELS),
        "queued": draw.random() < 0.5,
        "rows": draw.randint(1, 4),
        "width": draw.randint(1, 24),
        "window": draw.choice(["sliding", "sliding", "block"]),
        "guess": draw.choice(GUESSES),
        "eos": draw.choice([[], [], draw.sample(range(VOCABULARY), 6)]),
    } | fixed
    drawn.setdefault("drafts", draw.choice([0, 1, drawn["width"] - 1, draw.randint(1, 24)]) * (drawn["window"] == "sliding"))
    count = draw.randint(1, 2 * drawn["rows"] + 2) if drawn["queued"] else drawn["rows"]
    lengths = [draw.randint(1, 20) for _ in range(count)] if drawn["queued"] else [draw.randint(1, 24)] * count
    requests = [Request([draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, 25))], length) for length in lengths]
    return Case(requests=requests, **drawn)


def reusing(case: Case, number: int, **options: Any) -> JacobiDecoder:
    """A decoder for the case with prefix reuse within one of the budgets.

    It prefills shared and missing parts of prompts separately even where they are a single token.
    """
    decoder = case.decoder(prefix_cache=BUDGETS[number % len(BUDGETS)], **options)
    decoder.prefill.forward_tokens = 1
    return decoder


def follow(case: Case, texts: list[list[int]], name: Any) -> Case:
    """The case with prompts that share prefixes with earlier ``texts`` or with each other, drawn from ``name``.

    The shared prefix is empty, one token, of any length, of a multiple of 16, or a whole text.
    """
    draw = random.Random(f"follow {name}")
    known, requests = list(texts), []
    for request in case.requests:
        base = draw.choice([*known, [draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, LONGEST))]])
        most = min(len(base), LONGEST)
        shared = draw.choice([0, 1, draw.randint(1, most), max(1, draw.randint(0, most) // 16 * 16), most])
        prompt = base[:shared] + draw.choice([[], list(request.prompt)])
        requests.append(replace(request, prompt=prompt or list(request.prompt)))
        known.append(list(requests[-1].prompt))
    return replace(case, requests=requests)


def draw_drafts(name: Any) -> dict[str, Any]:
    """Fixed values for :func:`draw_case` that give a case with an adapter."""
    return {"window": "sliding", "drafts": random.Random(f"drafts {name}").randint(1, 24)}


def generate(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, eos: list[int], use_cache: bool = True) -> list[int]:
    """Hugging Face's own greedy decoding of one prompt."""
    output = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=0,
        use_cache=use_cache,
    )
    return output[0, len(prompt) :].tolist()


@lru_cache(maxsize=len(KINDS) * MODELS)
def _model(kind: str, seed: int) -> PreTrainedModel:
    return tiny_model(kind, seed, vocab_size=VOCABULARY, eos_token_id=None)


@lru_cache(maxsize=len(KINDS) * MODELS)
def _adapter(kind: str, seed: int) -> Adapter:
    return random_adapter(_model(kind, seed), seed)
