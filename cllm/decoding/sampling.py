"""Exact sampling: choices that are a function of the prefix, the seed and the position alone.

The maximum of scores plus Gumbel noise is a draw from their softmax (Gumbel 1954; Maddison et al. 2014, "A* sampling"). The
noise belongs to the absolute position, so iterating a window leads to the very text that drawing token by token gives.
Shapes: B rows, W window width, S positions of the text, V vocabulary, O options of a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from cllm.decoding.noise import gumbel_noise
from cllm.errors import LARGEST, UsageError

OPTIONS = 5  # O: how many numbers Sampling.options gives
COLDEST, HOTTEST = 1e-5, 100_000  # temperatures, and penalties, whose scores float32 can still tell apart
CHUNK = 1 << 25  # logits that are worked on together, to bound the memory
Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # text so far [t], scores of what follows [V] -> scores [V]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one row are chosen; the default is greedy. The options have the meaning they have in transformers.

    Rows with the same prompt and the same options get the same text: give each sample a seed of its own.
    Raises UsageError for a value that is out of range; whatever passes fits into the tensors of a batch.
    """

    temperature: float = 0.0  # 0: greedy, and top_k, top_p and min_p have no meaning
    top_k: int = 0  # only the k most likely tokens; 0: off
    top_p: float = 1.0  # only the most likely tokens that have this probability together; 1: off; 0: greedy
    min_p: float = 0.0  # only tokens at least this times as likely as the most likely one; 0: off
    repetition_penalty: float = 1.0  # on tokens of the prompt and of the output so far; 1: off
    seed: int = 0  # an int64

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or COLDEST <= self.temperature <= HOTTEST):
            raise UsageError(f"temperature must be 0 (greedy) or between {COLDEST} and {HOTTEST}, got {self.temperature}")
        if not 0 <= self.top_k <= LARGEST:
            raise UsageError(f"top_k must be between 0 (off) and {LARGEST}, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise UsageError(f"top_p must be between 0 and 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must be between 0 and 1, got {self.min_p}")
        if not COLDEST <= self.repetition_penalty <= HOTTEST:
            raise UsageError(f"repetition_penalty must be between {COLDEST} and {HOTTEST}, got {self.repetition_penalty}")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise UsageError(f"seed must be between -2**63 and 2**63 - 1, got {self.seed}")

    @property
    def draws(self) -> bool:
        """Whether chance has a say. Where it has none, the likeliest token is chosen."""
        return self.temperature > 0 and self.top_p > 0

    def of(self, name: str) -> Sampling:
        """The same with a seed of its own, which depends on this one's seed and on ``name`` alone."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:8]) >> 1)

    def options(self) -> tuple[float, ...]:
        """The O numbers that a :class:`Chooser` needs of a row. A greedy row keeps every token."""
        if not self.draws:
            return (0.0, 0.0, 1.0, 0.0, self.repetition_penalty)
        return (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    @property
    def label(self) -> str:
        """The options that matter, for people: "temperature 0.8, top_p 0.95"."""
        named = zip(fields(self), self.options(), strict=False)  # all but the seed
        changed = [f"{field.name} {value}" for field, value in named if value != field.default]
        return ", ".join([*["greedy"][: not self.draws], *changed])


GREEDY = Sampling()


@dataclass(frozen=True)
class ProcessedSampling(Sampling):
    """Choices from scores that ``process`` has changed first, as transformers' logits processors do.

    With a sliding window it is called once for every token of the output, in their order, as in AR decoding. It never sees
    a guess that turns out wrong. It runs on the host: every token costs a look at the device.
    """

    process: Process | None = None


def per_prompt(sampling: Sampling | Sequence[Sampling], prompts: int) -> list[Sampling]:
    """One Sampling for each prompt. Raises UsageError if there are more or fewer."""
    if isinstance(sampling, Sampling):
        return [sampling] * prompts
    if len(sampling) != prompts:
        raise UsageError(f"sampling must be one for all prompts or one for each of the {prompts}, got {len(sampling)}")
    return list(sampling)


class Windows(NamedTuple):
    """The windows that choices are made for, and what their choices depend on."""

    logits_BWV: torch.Tensor
    text_BS: torch.Tensor
    window_BW: torch.Tensor  # stands in the text at start_B
    start_B: torch.Tensor
    options_BO: torch.Tensor
    seed_B: torch.Tensor


class Chooser:
    """Chooses tokens as Sampling objects want it: which steps any row needs is known here, before any tensor."""

    def __init__(self, samplings: Sequence[Sampling], places: Iterable[int] | None = None) -> None:
        """``places``: where each one's row stands in the batch, in the order of ``samplings`` unless given."""
        drawn = [s for s in samplings if s.draws]
        self.draws = bool(drawn)
        self.penalises = any(s.repetition_penalty != 1 for s in samplings)
        self.largest_k = max((s.top_k for s in drawn), default=0)
        self.limits_top_p = any(s.top_p < 1 for s in drawn)
        self.limits_min_p = any(s.min_p > 0 for s in drawn)
        placed = zip(places or range(len(samplings)), samplings)
        self.processes = [(place, s.process) for place, s in placed if isinstance(s, ProcessedSampling) and s.process]

    @property
    def greedy(self) -> bool:
        """The likeliest token is chosen, in all rows."""
        return not (self.draws or self.penalises or self.processes)

    @property
    def kind(self) -> tuple[int, ...]:
        """Choosers of the same kind, none of which has ``processes``, do the same to tensors."""
        return (self.draws, self.penalises, self.largest_k, self.limits_top_p, self.limits_min_p)

    def choose(self, at: Windows) -> torch.Tensor:
        """The choices [B, W] behind each token of the windows.

        Each choice takes the window up to its own token for the true text: it is right if that is.
        """
        choices_BW = self._choose(at)
        for row, process in self.processes:
            choices_BW[row] = self._follow(process, choices_BW[row], Windows(*(of[row : row + 1] for of in at)))
        return choices_BW

    def guess(self, at: Windows) -> torch.Tensor:
        """The same for windows of draft tokens, whose choices are guesses: ``processes`` are not asked."""
        return self._choose(at)

    def _follow(self, process: Process, choices_W: torch.Tensor, at: Windows) -> torch.Tensor:
        """Choose again, in one row, from processed scores, as far as the window's guesses turn out right."""
        choices_W, text_1S, start = choices_W.clone(), at.text_BS.clone(), int(at.start_B)
        window_W = at.window_BW[0]
        text_1S[0, start : start + len(window_W)] = window_W
        for ahead, logits_V in enumerate(at.logits_BWV[0]):
            scores_V = process(text_1S[0, : start + ahead + 1], logits_V.float())
            one = at._replace(
                logits_BWV=scores_V[None, None],
                text_BS=text_1S,
                window_BW=at.window_BW[:, ahead : ahead + 1],
                start_B=at.start_B + ahead,
            )
            choices_W[ahead] = self._choose(one)[0, 0]
            if not torch.equal(choices_W[ahead : ahead + 1], window_W[ahead + 1 : ahead + 2]):
                break  # what follows is no true text
        return choices_W

    def _choose(self, at: Windows) -> torch.Tensor:
        """:meth:`choose` from the scores as they are."""
        if not (self.draws or self.penalises):
            return at.logits_BWV.argmax(dim=-1)
        rows = max(1, CHUNK // at.logits_BWV[0].numel())
        if len(at.logits_BWV) > rows:
            return torch.cat([self._choose(Windows(*part)) for part in zip(*(of.split(rows) for of in at), strict=True)])
        positions_BW = at.start_B[:, None] + torch.arange(at.window_BW.shape[1], device=at.start_B.device)
        scores_BWV = at.logits_BWV.float()
        if self.penalises:
            text_BS = at.text_BS.scatter(1, positions_BW, at.window_BW)
            scores_BWV = penalise(scores_BWV, seen(text_BS, positions_BW, scores_BWV.shape[-1]), at.options_BO[:, 4])
        if self.draws:
            scores_BWV = self.warp(scores_BWV, at.options_BO)
            noise_BWV = gumbel_noise(at.seed_B, positions_BW + 1, scores_BWV.shape[-1])
            scores_BWV = scores_BWV + torch.where(at.options_BO[:, 0, None, None] > 0, noise_BWV, 0.0)
        return scores_BWV.argmax(dim=-1)

    def warp(self, scores_BWV: torch.Tensor, options_BO: torch.Tensor) -> torch.Tensor:
        """Scores whose softmax is to be drawn from: temperature and filters, in the order of transformers' ``generate``."""
        temperature, top_k, top_p, min_p, _ = options_BO[:, :, None, None].unbind(dim=1)
        scores_BWV = scores_BWV / torch.where(temperature > 0, temperature, 1.0)
        if self.largest_k:
            scores_BWV = _cut(scores_BWV, _kth(scores_BWV, top_k.long(), self.largest_k))
        if self.limits_top_p:
            scores_BWV = _cut(scores_BWV, _nucleus(scores_BWV, top_p))
        if self.limits_min_p:
            scores_BWV = _cut(scores_BWV, scores_BWV.amax(dim=-1, keepdim=True) + min_p.log())
        return scores_BWV


def seen(text_BS: torch.Tensor, positions_BW: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Which tokens [B, W, V] occur in the text at or before each position.

    Ids beyond the vocabulary of the logits, which some checkpoints' prompts can hold, are passed over.
    """
    B, S = text_BS.shape
    order_BS = torch.arange(S, device=text_BS.device).expand(B, S)
    first_BV = torch.full((B, vocabulary + 1), S, device=text_BS.device)
    first_BV.scatter_reduce_(1, text_BS.clamp(max=vocabulary), order_BS, "amin")
    return first_BV[:, None, :-1] <= positions_BW[:, :, None]


def penalise(scores_BWV: torch.Tensor, seen_BWV: torch.Tensor, penalty_B: torch.Tensor) -> torch.Tensor:
    """The repetition penalty of Keskar et al. 2019 (CTRL, section 4.1), which pushes scores down on both sides of 0."""
    penalty = penalty_B[:, None, None]
    penalised_BWV = torch.where(scores_BWV < 0, scores_BWV * penalty, scores_BWV / penalty)
    return torch.where(seen_BWV, penalised_BWV, scores_BWV)


def _cut(scores_BWV: torch.Tensor, lowest_BW1: torch.Tensor) -> torch.Tensor:
    """Leave out what is below; tokens of equal score stay or go together, so the order of a sort never matters."""
    return scores_BWV.masked_fill(scores_BWV < lowest_BW1, -math.inf)


def _kth(scores_BWV: torch.Tensor, k_B11: torch.Tensor, largest_k: int) -> torch.Tensor:
    """The k-th highest score [B, W, 1] (Fan et al. 2018); -inf where k is 0."""
    B, W, V = scores_BWV.shape
    highest_BWK = scores_BWV.topk(min(largest_k, V), dim=-1).values
    last = (k_B11 - 1).clamp(0, highest_BWK.shape[-1] - 1).expand(B, W, 1)
    return highest_BWK.gather(-1, last).masked_fill(k_B11 == 0, -math.inf)


def _nucleus(scores_BWV: torch.Tensor, top_p_B11: torch.Tensor) -> torch.Tensor:
    """The lowest score [B, W, 1] of the fewest tokens with probability ``top_p`` (Holtzman et al. 2020); -inf where it is 1."""
    sorted_BWV = scores_BWV.sort(dim=-1).values
    left_out_BWV = sorted_BWV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p_B11
    lowest_BW1 = sorted_BWV.gather(-1, left_out_BWV.sum(dim=-1, keepdim=True).clamp(max=scores_BWV.shape[-1] - 1))
    return lowest_BW1.masked_fill(top_p_B11 == 1, -math.inf)
