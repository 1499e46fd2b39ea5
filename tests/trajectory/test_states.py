"""The states of all blocks at once equal those of the paper's cache-less procedure, one block after another."""

import random

import pytest
import torch
from tiny import KINDS, tiny_model

from cllm import reference
from cllm.decoding import JacobiDecoder
from cllm.decoding.guess import context_tokens
from cllm.trajectory.states import block_starts, jacobi_states


def start_guess(seed: int) -> reference.StartGuess:
    """The decoder's starting guesses in the form that the plain procedure takes."""

    def guess(prefix, size):
        positions = torch.arange(len(prefix), len(prefix) + size)[None]
        known, seeds = torch.tensor([len(prefix)]), torch.tensor([seed])
        return context_tokens(torch.tensor([list(prefix)]), known, positions, seeds)[0].tolist()

    return guess


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_papers_procedure(kind, seed):
    draw, model = random.Random(f"{kind} {seed}"), tiny_model(kind, seed)
    size, length = draw.choice([1, 2, 5, 8, 16]), draw.randint(1, 40)
    prompts = [[draw.randrange(1, 97) for _ in range(draw.randint(1, 25))] for _ in range(4)]
    expected = [reference.collect(model, p, size, length, start_guess(i))[0] for i, p in enumerate(prompts)]
    responses = [[t for block in blocks for t in block.states[-1]] for blocks in expected]
    starts = [block_starts(len(response), size) for response in responses]
    states = jacobi_states(model, prompts, responses, starts, seeds=range(4))
    assert states == [[block.states for block in blocks] for blocks in expected]


def test_states_do_not_depend_on_the_batch():
    model, prompts = tiny_model(seed=1), [[1, 2, 3], [4] * 12]
    responses = [r.token_ids for r in JacobiDecoder(model, 1).generate(prompts, max_new_tokens=20)]
    starts = [block_starts(20, 8, first) for first in (3, 0)]
    together = jacobi_states(model, prompts, responses, starts, seeds=[7, 8])
    alone = [jacobi_states(model, [p], [r], [s], seeds=[seed])[0] for p, r, s, seed in zip(prompts, responses, starts, [7, 8])]
    assert together == alone


@pytest.mark.parametrize("width", range(1, 8))
def test_a_prefix_of_a_state_is_a_state_of_the_narrower_block(width):
    """What ``random_block_size`` relies on: no token sees later ones, so what follows a prefix cannot change it."""
    model, prompts = tiny_model(seed=2), [[1, 2, 3], [9] * 7]
    responses = [r.token_ids for r in JacobiDecoder(model, 1).generate(prompts, max_new_tokens=24)]
    wide = jacobi_states(model, prompts, responses, [[0, 8, 16]] * 2, seeds=[4, 5])
    narrow = jacobi_states(model, prompts, responses, [[0, width, 8, 8 + width, 16, 16 + width]] * 2, seeds=[4, 5])
    for states, narrower in zip([s for row in wide for s in row], [s for row in narrow for s in row[::2]]):
        prefixes = [state[:width] for state in states]
        fixed = prefixes.index(prefixes[-1])
        assert narrower == prefixes[: fixed + 1]


def test_trajectories_end_in_the_given_response():
    """Even in a response that the model would not have written."""
    model, response = tiny_model(), [5, 4, 3, 2, 1, 9, 8, 7]
    ((first, second),) = jacobi_states(model, [[1, 2]], [response], [[0, 4]], seeds=[0])
    assert first[-1] == response[:4] and second[-1] == response[4:]
    assert all(len(states) <= 5 for states in (first, second))


@pytest.mark.parametrize(
    ("length", "size", "first", "starts"),
    [(10, 4, 0, [0, 4, 8]), (10, 4, 3, [0, 3, 7]), (3, 4, 0, [0]), (3, 4, 3, [0]), (4, 1, 0, [0, 1, 2, 3])],
)
def test_block_starts(length, size, first, starts):
    assert block_starts(length, size, first) == starts
