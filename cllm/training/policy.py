"""States that come from the model in training itself, in the place of stored ones (on-policy training).

Works on collated batches of global consistency (:class:`cllm.training.examples.Collator`), whose ``student`` and ``teacher``
name, for each token of a state, its place in the packed row and that of the clean token it stands for.

Shapes: M tokens of states, block by block.
"""

from __future__ import annotations

import torch

from cllm.training.base import Batch


def advance(batch: Batch, following_M: torch.Tensor) -> Batch:
    """One Jacobi iteration of all states: ``following_M`` is what the model puts behind each of their tokens.

    As at collection (:func:`cllm.trajectory.states.jacobi_states`), the first wrong guess becomes the clean token, whatever
    the model would write there, so that every iteration is progress towards the fixed point. The layout stays.
    """
    places, at_M = batch["student"].unbind(1), torch.arange(len(following_M), device=following_M.device)
    clean_M = batch["input_ids"][batch["teacher"].unbind(1)]
    state_M = torch.where(at_M <= _first_wrong(batch), clean_M, following_M.roll(1))
    return batch | {"input_ids": batch["input_ids"].index_put(places, state_M)}


def learn_where_wrong(batch: Batch, distance_decay: float) -> Batch:
    """Take the loss from each state's first wrong guess on, weighed by the distance from it; the rest is clean text again."""
    distance_M = torch.arange(len(batch["student"]), device=batch["student"].device) - _first_wrong(batch)
    learned_M = distance_M >= 0
    return batch | {
        "student": batch["student"][learned_M],
        "teacher": batch["teacher"][learned_M],
        "weight": distance_decay ** distance_M[learned_M].float(),
    }


def _first_wrong(batch: Batch) -> torch.Tensor:
    """The number (in 0 .. M) of the first wrong guess in each token's state, M where all of it is right: [M]."""
    places, ids = batch["student"].unbind(1), batch["input_ids"]
    wrong_M = ids[places] != ids[batch["teacher"].unbind(1)]
    state_M = (batch["position"][places] == batch["horizon"][places]).cumsum(0) - 1  # a state's first token starts its block
    M = len(state_M)
    number_M = torch.where(wrong_M, torch.arange(M, device=ids.device), M)
    return torch.full_like(number_M, M).scatter_reduce(0, state_M, number_M, "amin")[state_M]
