"""AR and Jacobi decoding of the same prompt, interleaved on one device."""

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
    """One token and its text, which may be empty if a character spans several tokens."""

    id: int
    text: str


@dataclass(frozen=True)
class Gained(Token):
    """A token that a forward pass verified: ``fast`` if it had been guessed, ``stationary`` if already one forward earlier."""

    kind: Kind


@dataclass(frozen=True)
class Step:
    """One forward pass of one method."""

    method: Method
    forward: int  # its number, from 1
    seconds: float  # the method's time so far
    state: list[Token]  # the window before the pass; its first token is verified
    gained: list[Gained]
    generated: int  # tokens generated so far
    ended: bool


class Racer:
    """One method's decoding of the prompt, with its own clock."""

    def __init__(
        self, method: Method, decoder: JacobiDecoder, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], length: int
    ) -> None:
        self.method, self.tokenizer = method, tokenizer
        self.iterations = decoder.iterate([prompt], max_new_tokens=length, scope=None)  # without reusing the other's prefill
        self.limit = length if decoder.context is None else min(length, decoder.context - len(prompt))
        self.eos = set(decoder.eos_ids.tolist())
        self.text = TextStream(tokenizer)
        self.seconds, self.forwards, self.generated = 0.0, 0, 0
        self.ended = False
        self._choices: list[int] = []  # of the previous iteration, as are the window and the emitted tokens
        self._window: list[int] = []
        self._emitted = 0

    def step(self) -> Step:
        """Run the next forward pass."""
        start = time.perf_counter()
        window, choices, emitted = _host(next(self.iterations))
        self.seconds += time.perf_counter() - start
        self.forwards += 1
        self.generated += emitted
        self.ended = self.generated >= self.limit or choices[emitted - 1] in self.eos
        gained = [
            Gained(token, self.text.put([token]), self._kind(window, choices, index)) for index, token in enumerate(choices[:emitted])
        ]
        if self.ended and (rest := self.text.end()):
            gained[-1] = replace(gained[-1], text=rest)
        self._window, self._choices, self._emitted = window, choices, emitted
        state = [Token(token, self._alone(token)) for token in window]
        return Step(self.method, self.forwards, self.seconds, state, gained, self.generated, self.ended)

    def _kind(self, window: list[int], choices: list[int], index: int) -> Kind:
        """The kind of the token ``choices[index]``, whose guess was at ``index + 1`` in the window."""
        at = index + 1
        if at >= len(window) or window[at] != choices[index]:
            return "plain"
        before = at + self._emitted  # its index in the previous window
        was_right = before < len(self._window) and self._window[before] == self._choices[before - 1] == window[at]
        return "stationary" if was_right else "fast"

    def _alone(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def ar_decoder(decoder: JacobiDecoder) -> JacobiDecoder:
    """A decoder of the same model that decodes one token per forward."""
    return JacobiDecoder(decoder.model, 1, eos_token_ids=decoder.eos_ids.tolist())


def race(
    ar: JacobiDecoder, jacobi: JacobiDecoder, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], max_new_tokens: int
) -> Iterator[Step]:
    """Decode ``prompt`` greedily with both decoders, yielding each forward pass.

    The method with less time on its clock always goes next, so both progress at their own speed. Raises UsageError if the
    prompt cannot be decoded.
    """
    racers = [
        Racer("ar", ar, tokenizer, prompt, max_new_tokens),
        Racer("jacobi", jacobi, tokenizer, prompt, max_new_tokens),
    ]
    while running := [racer for racer in racers if not racer.ended]:
        yield min(running, key=lambda racer: racer.seconds).step()


def _host(iteration: Iteration) -> tuple[list[int], list[int], int]:
    """The window, the choices and the number of emitted tokens of a batch of one, on the host."""
    return iteration.window_BW[0].tolist(), iteration.choices_BW[0].tolist(), int(iteration.emitted_B[0])
