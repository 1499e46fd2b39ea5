"""Exact sampling: each choice is a function of the prefix, the seed and the position alone.

The argmax of scores plus Gumbel noise is a sample from their softmax (Gumbel 1954; Maddison et al. 2014, "A* sampling"). The
noise depends on the absolute position, so Jacobi iteration arrives at the same text as sampling token by token.
Shapes: B rows, W window width, S positions of the text, V vocabulary, O options per row.
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

OPTIONS = 5  # O, the length of Sampling.options
COLDEST, HOTTEST = 1e-5, 100_000  # the range of temperatures and penalties whose scores float32 can distinguish
CHUNK = 1 << 25  # logits processed at once, to bound the memory
Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # text so far [t], scores of the next token [V] -> scores [V]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one row are chosen; greedy by default. The options mean what they mean in transformers.

    Rows with the same prompt and the same options get the same text, so give each sample its own seed.
    Raises UsageError for a value out of range.
    """

    temperature: float = 0.0  # 0: greedy; top_k, top_p and min_p are then ignored
    top_k: int = 0  # keep the k most likely tokens; 0: off
    top_p: float = 1.0  # keep the most likely tokens that together have this probability; 1: off; 0: greedy
    min_p: float = 0.0  # keep tokens with at least this fraction of the highest probability; 0: off
    repetition_penalty: float = 1.0  # for tokens of the prompt and of the output so far; 1: off
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
        """Whether tokens are sampled; if not, the most likely token is chosen."""
        return self.temperature > 0 and self.top_p > 0

    def derive(self, name: str) -> Sampling:
        """A copy with a different seed, which depends only on this seed and ``name``."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:8]) >> 1)

    def options(self) -> tuple[float, ...]:
        """The O numbers that :class:`Chooser` needs for a row; those of a greedy row filter nothing."""
        if not self.draws:
            return (0.0, 0.0, 1.0, 0.0, self.repetition_penalty)
        return (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    @property
    def label(self) -> str:
        """The options that differ from the defaults, for reports: "temperature 0.8, top_p 0.95"."""
        named = zip(fields(self), self.options(), strict=False)  # all but the seed
        changed = [f"{field.name} {value}" for field, value in named if value != field.default]
        return ", ".join([*["greedy"][: not self.draws], *changed])


GREEDY = Sampling()


@dataclass(frozen=True)
class ProcessedSampling(Sampling):
    """Sampling from scores that ``process`` has changed, as transformers' logits processors do.

    With a sliding window, ``process`` is called once per token of the output, in order, as in AR decoding, and never sees a
    wrong guess. It runs on the host, so every token synchronises with the device.
    """

    process: Process | None = None


def per_prompt(sampling: Sampling | Sequence[Sampling], prompts: int) -> list[Sampling]:
    """One Sampling for each prompt. Raises UsageError if ``sampling`` is a sequence of another length."""
    if isinstance(sampling, Sampling):
        return [sampling] * prompts
    if len(sampling) != prompts:
        raise UsageError(f"sampling must be one for all prompts or one for each of the {prompts}, got {len(sampling)}")
    return list(sampling)


class Windows(NamedTuple):
    """Windows and all that the choices after their tokens depend on."""

    logits_BWV: torch.Tensor
    text_BS: torch.Tensor
    window_BW: torch.Tensor
    start_B: torch.Tensor  # position of the window's first token in the text
    options_BO: torch.Tensor
    seed_B: torch.Tensor


class Chooser:
    """Chooses the tokens of a batch. Knows from the Sampling objects which operations any row needs, so others are skipped."""

    def __init__(self, samplings: Sequence[Sampling], places: Iterable[int] | None = None) -> None:
        """``places``: the index in the batch of each sampling's row; by default 0, 1, ..."""
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
        """Whether all rows simply take the most likely token."""
        return not (self.draws or self.penalises or self.processes)

    @property
    def kind(self) -> tuple[int, ...]:
        """Choosers of the same kind run the same operations on tensors, ``processes`` aside."""
        return (self.draws, self.penalises, self.largest_k, self.limits_top_p, self.limits_min_p)

    def choose(self, windows: Windows) -> torch.Tensor:
        """The choices [B, W] after each token of the windows.

        Each choice assumes that the window up to its own token is right.
        """
        choices_BW = self._choose(windows)
        for row, process in self.processes:
            one_row = Windows(*(tensor[row : row + 1] for tensor in windows))
            choices_BW[row] = self._choose_processed(process, choices_BW[row], one_row)
        return choices_BW

    def guess(self, windows: Windows) -> torch.Tensor:
        """:meth:`choose` for draft tokens, whose choices are only guesses: ``processes`` are not called."""
        return self._choose(windows)

    def _choose_processed(self, process: Process, choices_W: torch.Tensor, windows: Windows) -> torch.Tensor:
        """Replace the choices of one row by those from processed scores, up to the first one that contradicts a guess."""
        choices_W, text_1S, start = choices_W.clone(), windows.text_BS.clone(), int(windows.start_B)
        window_W = windows.window_BW[0]
        text_1S[0, start : start + len(window_W)] = window_W
        for ahead, logits_V in enumerate(windows.logits_BWV[0]):
            scores_V = process(text_1S[0, : start + ahead + 1], logits_V.float())
            one = windows._replace(
                logits_BWV=scores_V[None, None],
                text_BS=text_1S,
                window_BW=windows.window_BW[:, ahead : ahead + 1],
                start_B=windows.start_B + ahead,
            )
            choices_W[ahead] = self._choose(one)[0, 0]
            if not torch.equal(choices_W[ahead : ahead + 1], window_W[ahead + 1 : ahead + 2]):
                break  # the rest of the window is wrong
        return choices_W

    def _choose(self, windows: Windows) -> torch.Tensor:
        """:meth:`choose` without ``processes``."""
        if not (self.draws or self.penalises):
            return windows.logits_BWV.argmax(dim=-1)
        rows = max(1, CHUNK // windows.logits_BWV[0].numel())
        if len(windows.logits_BWV) > rows:
            chunks = zip(*(tensor.split(rows) for tensor in windows), strict=True)
            return torch.cat([self._choose(Windows(*chunk)) for chunk in chunks])
        positions_BW = windows.start_B[:, None] + torch.arange(windows.window_BW.shape[1], device=windows.start_B.device)
        scores_BWV = windows.logits_BWV.float()
        if self.penalises:
            text_BS = windows.text_BS.scatter(1, positions_BW, windows.window_BW)
            scores_BWV = penalise(scores_BWV, seen(text_BS, positions_BW, scores_BWV.shape[-1]), windows.options_BO[:, 4])
        if self.draws:
            scores_BWV = self.warp(scores_BWV, windows.options_BO)
            noise_BWV = gumbel_noise(windows.seed_B, positions_BW + 1, scores_BWV.shape[-1])
            scores_BWV = scores_BWV + torch.where(windows.options_BO[:, 0, None, None] > 0, noise_BWV, 0.0)
        return scores_BWV.argmax(dim=-1)

    def warp(self, scores_BWV: torch.Tensor, options_BO: torch.Tensor) -> torch.Tensor:
        """The scores [B, W, V] to sample from: temperature and filters, in the order of transformers' ``generate``."""
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
    """Which tokens occur in the text at or before each position: boolean [B, W, V].

    Ignores ids outside the vocabulary of the logits, which the prompts of some checkpoints can contain.
    """
    B, S = text_BS.shape
    order_BS = torch.arange(S, device=text_BS.device).expand(B, S)
    first_BV = torch.full((B, vocabulary + 1), S, device=text_BS.device)
    first_BV.scatter_reduce_(1, text_BS.clamp(max=vocabulary), order_BS, "amin")
    return first_BV[:, None, :-1] <= positions_BW[:, :, None]


def penalise(scores_BWV: torch.Tensor, seen_BWV: torch.Tensor, penalty_B: torch.Tensor) -> torch.Tensor:
    """The repetition penalty of Keskar et al. 2019 (CTRL, section 4.1); it lowers positive and negative scores alike."""
    penalty = penalty_B[:, None, None]
    penalised_BWV = torch.where(scores_BWV < 0, scores_BWV * penalty, scores_BWV / penalty)
    return torch.where(seen_BWV, penalised_BWV, scores_BWV)


def _cut(scores_BWV: torch.Tensor, lowest_BW1: torch.Tensor) -> torch.Tensor:
    """Remove scores below the threshold. Equal scores stay or go together, so the order of a sort never matters."""
    return scores_BWV.masked_fill(scores_BWV < lowest_BW1, -math.inf)


def _kth(scores_BWV: torch.Tensor, k_B11: torch.Tensor, largest_k: int) -> torch.Tensor:
    """The k-th highest score [B, W, 1] for top-k (Fan et al. 2018); -inf where k is 0."""
    B, W, V = scores_BWV.shape
    highest_BWK = scores_BWV.topk(min(largest_k, V), dim=-1).values
    last = (k_B11 - 1).clamp(0, highest_BWK.shape[-1] - 1).expand(B, W, 1)
    return highest_BWK.gather(-1, last).masked_fill(k_B11 == 0, -math.inf)


def _nucleus(scores_BWV: torch.Tensor, top_p_B11: torch.Tensor) -> torch.Tensor:
    """The lowest score [B, W, 1] in the smallest set of tokens with total probability ``top_p`` (Holtzman et al. 2020); -inf
    where ``top_p`` is 1.
    """
    sorted_BWV = scores_BWV.sort(dim=-1).values
    left_out_BWV = sorted_BWV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p_B11
    lowest_BW1 = sorted_BWV.gather(-1, left_out_BWV.sum(dim=-1, keepdim=True).clamp(max=scores_BWV.shape[-1] - 1))
    return lowest_BW1.masked_fill(top_p_B11 == 1, -math.inf)
