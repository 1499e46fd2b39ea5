"""Where responses are not a model's own greedy ones: another precision, another engine's near-ties, another model.

Shapes: B responses, C longest clean text, N longest response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from cllm.models import embedding_device
from cllm.packing import PackedRow, pack, packed_mask

SHOWN = 5  # responses that are named


class Departure(NamedTuple):
    """The first token of a response, counted from 0, that the model would not have chosen, and the logits between the two."""

    token: int
    margin: float


@torch.inference_mode()
def departures(model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Departure | None]:
    """For each response where it departs from what the model writes greedily; None where it does not.

    One forward over all of them. Memory: the logits of the responses, [B, N, V].
    """
    device = embedding_device(model)
    ids_BC, layout = pack([PackedRow([*prompt, *response]) for prompt, response in zip(prompts, responses)], pad_token_id=0)
    ids_BC, layout = ids_BC.to(device), layout.to(device)
    first = min(map(len, prompts)) - 1
    logits_BNV = model(
        input_ids=ids_BC,
        attention_mask=packed_mask(model.config, layout, layout, model.dtype),
        position_ids=layout.position_BT,
        use_cache=False,
        logits_to_keep=ids_BC.shape[1] - first,
    ).logits
    return [
        _departure(logits_NV[len(prompt) - 1 - first :][: len(response)], torch.tensor(response, device=device))
        for logits_NV, prompt, response in zip(logits_BNV, prompts, responses)
    ]


def describe(compared: int, found: Mapping[str, Departure]) -> Iterator[str]:
    """Lines for people on the departures among ``compared`` responses, by row id; none where nothing was compared."""
    if compared:
        yield f"{len(found)} of {compared} responses are not what the model here writes greedily"
    for row_id, departure in sorted(found.items(), key=lambda item: -item[1].margin)[:SHOWN]:
        yield f"  {row_id}: from token {departure.token} on, {departure.margin:.3g} below the best logit"
    if len(found) > SHOWN:
        yield f"  and {len(found) - SHOWN} more, each closer"


def _departure(logits_NV: torch.Tensor, response_N: torch.Tensor) -> Departure | None:
    best_N = logits_NV.amax(dim=1)
    short_N = (best_N - logits_NV.gather(1, response_N[:, None])[:, 0]).float()
    wrong = short_N.nonzero()
    return Departure(int(wrong[0]), float(short_N[wrong[0]])) if len(wrong) else None
