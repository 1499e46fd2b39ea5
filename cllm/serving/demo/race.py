"""AR and Jacobi decoding of the same prompt, in turns on the same device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from cllm.decoding import Iteration, JacobiDecoder
from cllm.serving.text import TextStream

Method = Literal["ar", "jacobi"]
Kind = Literal["plain", "fast", "stationary"]


@dataclass(frozen=True)
class Token:
    """One token and its text, which may be empty where a character takes several tokens."""

    id: int
    text: str


@dataclass(frozen=True)
class Gained(Token):
    """A token that a forward pass fixed: ``fast`` if it had been guessed, ``stationary`` if one forward earlier already."""

    kind: Kind


@dataclass(frozen=True)
class Step:
    """One forward pass of one of the two."""

    method: Method
    forward: int  # its number, from 1
    seconds: float  # that the method has taken so far
    state: list[Token]  # the window that went in; its first token is verified
    gained: list[Gained]
    generated: int  # tokens of the text so far
    ended: bool


class Racer:
    """One method's way through a prompt, with its own clock."""

    def __init__(
        self, method: Method, decoder: JacobiDecoder, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], length: int
    ) -> None:
        self.method, self.tokenizer = method, tokenizer
        self.iterations = decoder.iterate([prompt], max_new_tokens=length, scope=None)  # both compute all of the prompt
        self.most = length if decoder.context is None else min(length, decoder.context - len(prompt))
        self.eos = set(decoder.eos_ids.tolist())
        self.text = TextStream(tokenizer)
        self.seconds, self.forwards, self.generated = 0.0, 0, 0
        self.ended = False
        self._choices: list[int] = []  # of the iteration before, and what it had been given
        self._window: list[int] = []
        self._emitted = 0

    def step(self) -> Step:
        """The next forward pass."""
        start = time.perf_counter()
        window, choices, emitted = _host(next(self.iterations))
        self.seconds += time.perf_counter() - start
        self.forwards += 1
        self.generated += emitted
        self.ended = self.generated >= self.most or choices[emitted - 1] in self.eos
        gained = [
            Gained(token, self.text.put([token]), self._kind(window, choices, index)) for index, token in enumerate(choices[:emitted])
        ]
        if self.ended and (rest := self.text.end()):
            gained[-1] = replace(gained[-1], text=rest)
        self._window, self._choices, self._emitted = window, choices, emitted
        state = [Token(token, self._alone(token)) for token in window]
        return Step(self.method, self.forwards, self.seconds, state, gained, self.generated, self.ended)

    def _kind(self, window: list[int], choices: list[int], index: int) -> Kind:
        """How the token ``choices[index]`` came about; as a guess it stood one place further on in the window."""
        place = index + 1
        if place >= len(window) or window[place] != choices[index]:
            return "plain"
        before = place + self._emitted
        stood = before < len(self._window) and self._window[before] == self._choices[before - 1] == window[place]
        return "stationary" if stood else "fast"

    def _alone(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def token_by_token(decoder: JacobiDecoder) -> JacobiDecoder:
    """What a decoder races against: the same model, one token a forward."""
    return JacobiDecoder(decoder.model, 1, eos_token_ids=decoder.eos_ids.tolist())


def race(
    ar: JacobiDecoder, jacobi: JacobiDecoder, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], max_new_tokens: int
) -> Iterator[Step]:
    """Decode ``prompt`` twice, greedily.

    The next forward pass is always that of the method whose clock is behind, so both are seen at their own speed. Raises
    UsageError where the prompt cannot be decoded.
    """
    racers = [
        Racer("ar", ar, tokenizer, prompt, max_new_tokens),
        Racer("jacobi", jacobi, tokenizer, prompt, max_new_tokens),
    ]
    while running := [racer for racer in racers if not racer.ended]:
        yield min(running, key=lambda racer: racer.seconds).step()


def _host(iteration: Iteration) -> tuple[list[int], list[int], int]:
    """Window, choices and emitted tokens of a batch of one."""
    return iteration.window_BW[0].tolist(), iteration.choices_BW[0].tolist(), int(iteration.emitted_B[0])
