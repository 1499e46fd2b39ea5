"""The paper's procedures written plainly, as the oracle of the tests and the baseline of the benchmarks.

There is no packing, no batching and, except in the decoders, no cache: each forward computes the whole text for one block of
one response, as in arXiv 2403.00835 (Algorithm 1, equations 2 to 4) and its published code. UNO's decoding with an adapter
(arXiv 2609.04010) is here for the same purpose. Too slow for anything but checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, log_softmax, softmax
from transformers import DynamicCache, PreTrainedModel

from cllm.adapter import Adapter
from cllm.attention import cache_argument

StartGuess = Callable[[Sequence[int], int], list[int]]


@dataclass(frozen=True)
class ReferenceBlock:
    """One block: the text before it and its states, from the random start to the fixed point."""

    prefix: list[int]
    states: list[list[int]]


@torch.inference_mode()
def collect(
    model: PreTrainedModel,
    prompt: Sequence[int],
    block_size: int,
    max_new_tokens: int,
    start_guess: StartGuess,
    eos_token_ids: Sequence[int] = (),
) -> tuple[list[ReferenceBlock], int]:
    """The Jacobi trajectories of one response, and how many tokens the model computed.

    ``start_guess(prefix, size)`` returns a block's first state. Stops after the block that contains an end-of-sequence id.
    """
    prefix, blocks, forwarded = list(prompt), [], 0
    while len(prefix) - len(prompt) < max_new_tokens:
        size = min(block_size, max_new_tokens - (len(prefix) - len(prompt)))
        states = [start_guess(prefix, size)]
        while True:
            text = torch.tensor([prefix + states[-1]], device=model.device)
            forwarded += text.shape[1]
            following = model(text).logits[0, len(prefix) - 1 : -1].argmax(dim=-1).tolist()
            if following == states[-1]:
                break
            states.append(following)
        blocks.append(ReferenceBlock(prefix, states))
        prefix = prefix + states[-1]
        if set(states[-1]) & set(eos_token_ids):
            break
    return blocks, forwarded


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompt: Sequence[int],
    block_size: int,
    max_new_tokens: int,
    start_guess: StartGuess,
    eos_token_ids: Sequence[int] = (),
) -> tuple[list[int], int]:
    """Jacobi decoding with a key-value cache, as in the paper's decoder: the response, and how many forwards it took.

    A block is a verified token and guesses; it shrinks as tokens are verified. After every forward, the entries of wrong
    guesses are cropped from the cache.
    """
    cache = DynamicCache(config=model.config)
    response: list[int] = []
    window, guesses, forwards = list(prompt), 0, 0  # the last ``guesses`` tokens of the window are unverified
    while True:
        logits = model(torch.tensor([window], device=model.device), **{cache_argument(model): cache}).logits[0]
        choices, drafted = logits[-1 - guesses :].argmax(dim=-1).tolist(), window[len(window) - guesses :]
        forwards += 1
        right = next((i for i, token in enumerate(drafted) if token != choices[i]), guesses)
        response += choices[: right + 1]
        if (end := _end(response, max_new_tokens, eos_token_ids)) is not None:
            return response[:end], forwards
        if right < guesses:
            cache.crop(right - guesses)
        rest = choices[right + 1 : guesses] or start_guess([*prompt, *response], block_size - 1)
        window, guesses = [response[-1], *rest], len(rest)


@torch.inference_mode()
def decode_two_passes(
    model: PreTrainedModel,
    adapter: Adapter,
    prompt: Sequence[int],
    width: int,
    max_new_tokens: int,
    start_guess: StartGuess,
    eos_token_ids: Sequence[int] = (),
) -> tuple[list[int], int]:
    """UNO's linear layout: the response, and how many forwards it took, including the prompt's.

    A drafting forward computes the last verified token with the adapter off and ``width`` - 1 (>= 1) starting guesses with it
    on. A verifying forward computes their choices with the adapter off. Each pair of forwards yields at least two tokens.
    Full attention only.
    """
    cache = DynamicCache(config=model.config)

    def following(tokens: Sequence[int]) -> list[int]:
        return model(torch.tensor([list(tokens)], device=model.device), **{cache_argument(model): cache}).logits[0].argmax(dim=-1).tolist()

    response, forwards = following(prompt)[-1:], 1
    while (end := _end(response, max_new_tokens, eos_token_ids)) is None:
        with drafting(model, adapter, width - 1):
            drafted = following([response[-1], *start_guess([*prompt, *response], width - 1)])
        cache.crop(1 - width)
        choices = following(drafted)
        forwards += 2
        right = next((i for i, (a, b) in enumerate(zip(drafted[1:], choices)) if a != b), width - 1)
        response += [*drafted[: right + 1], choices[right]]
        if right < width - 1:
            cache.crop(right + 1 - width)
    return response[:end], forwards


@contextmanager
def drafting(model: PreTrainedModel, adapter: Adapter, tokens: int) -> Iterator[None]:
    """Inside, the adapter is on for the last ``tokens`` (>= 1) of every forward. For a single row."""

    def add(down: torch.Tensor, up: torch.Tensor) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            delta = inputs[0][..., -tokens:, :] @ down.to(output).T @ up.to(output).T
            return torch.cat([output[..., :-tokens, :], output[..., -tokens:, :] + delta], dim=-2)

        return hook

    layers = dict(model.named_modules())
    handles = [layers[name].register_forward_hook(add(down, adapter.up[name])) for name, down in adapter.down.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _end(response: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]) -> int | None:
    """The final length of a response in tokens; None if it is unfinished."""
    ended = next((i + 1 for i, token in enumerate(response) if token in eos_token_ids), None)
    if ended is None and len(response) < max_new_tokens:
        return None
    return min(ended or max_new_tokens, max_new_tokens)


def training_losses(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], block: ReferenceBlock, state: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The consistency and AR losses of one block, summed over tokens, and how many tokens the model computed.

    Three forwards, as in the published trainer: the whole response for the AR loss; the prefix with the fixed point (no
    gradient) and the prefix with the chosen state for the consistency loss.
    """
    whole = torch.tensor([[*prompt, *response]], device=model.device)
    ar_logits = model(whole).logits[0, len(prompt) - 1 : -1].float()
    ar = cross_entropy(ar_logits, whole[0, len(prompt) :], reduction="sum")

    fixed, guess = block.states[-1], block.states[state]
    at = len(block.prefix)
    with torch.no_grad():
        teacher = softmax(model(torch.tensor([block.prefix + fixed], device=model.device)).logits[0, at:].float(), dim=-1)
    student = log_softmax(model(torch.tensor([block.prefix + guess], device=model.device)).logits[0, at:].float(), dim=-1)
    first = next((i for i, (a, b) in enumerate(zip(guess, fixed)) if a != b), len(fixed))
    last = len(prompt) + len(response) - at - 1  # the final token of the response predicts nothing
    teacher, student = teacher[first:last], student[first:last]
    consistency = (teacher * (teacher.clamp_min(1e-38).log() - student)).sum()
    return consistency, ar, whole.shape[1] + 2 * (at + len(fixed))
