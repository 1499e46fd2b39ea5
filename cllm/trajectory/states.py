"""The Jacobi trajectories of all blocks of several responses at once.

The responses (fixed points) are known. Each iteration forwards only each block's guesses from the first wrong one on; what
precedes them is clean text, whose keys and values are computed once (:mod:`cllm.packing`). In exact arithmetic the states
equal those of the paper's procedure (section 3.2), which forwards the whole text for one block after another.

Shapes: B responses, K blocks of all responses, S states, N longest block, C longest clean text, T packed tokens of a forward,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cllm.attention import cache_argument
from cllm.decoding.cache import RowCache
from cllm.decoding.guess import FreshGuess, context_tokens
from cllm.decoding.linear import LinearPatch
from cllm.models import embedding_device
from cllm.packing import PADDING, Layout, PackedRow, pack, packed_mask

States = list[list[int]]  # [state][token] of one block


@dataclass(frozen=True)
class _Blocks:
    """All blocks of the batch, ordered by response."""

    row_K: torch.Tensor
    start_K: torch.Tensor  # absolute position of the first token
    length_K: torch.Tensor
    fixed_KN: torch.Tensor

    @property
    def valid_KN(self) -> torch.Tensor:
        return torch.arange(self.fixed_KN.shape[1], device=self.length_K.device) < self.length_K[:, None]


def block_starts(response_length: int, block_size: int, first: int = 0) -> list[int]:
    """Block offsets of a response: 0, then ``first``, then every ``block_size`` tokens."""
    return sorted({0, *range(first, response_length, block_size)})


@torch.inference_mode()
def jacobi_states(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    starts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    guess: FreshGuess = context_tokens,
) -> list[list[States]]:
    """The trajectory of every block of every response, from the random start to the fixed point, both included.

    ``starts`` holds the block offsets of each response (see :func:`block_starts`), ``seeds`` one seed per response for
    ``guess``. ``responses`` should be the model's greedy ones. Where they differ from the model's choice, the response's token
    is taken, so the last state always equals the response. One forward holds logits for every guess not yet fixed.
    """
    device = embedding_device(model)
    clean = [[*prompt, *response] for prompt, response in zip(prompts, responses)]
    ids_BC, layout = pack([PackedRow(c) for c in clean], pad_token_id=0)
    ids_BC, layout = ids_BC.to(device), layout.to(device)
    blocks = _find_blocks(prompts, responses, starts, device)
    state_KN = _random_start(blocks, ids_BC, guess, torch.tensor(seeds, device=device))
    history, steps_K = [state_KN], torch.zeros_like(blocks.length_K)
    with LinearPatch.refreshed(model):
        cache = _clean_cache(model, ids_BC, layout)
        while (active_K := ((state_KN != blocks.fixed_KN) & blocks.valid_KN).any(dim=1)).any():
            state_KN = _iterate(model, blocks, state_KN, cache, layout)
            history.append(state_KN)
            steps_K += active_K
    return _unstack(torch.stack(history, dim=1), blocks, steps_K, len(clean))


def _find_blocks(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    starts: Sequence[Sequence[int]],
    device: torch.device,
) -> _Blocks:
    row, start, tokens = [], [], []
    for b, (prompt, response, offsets) in enumerate(zip(prompts, responses, starts)):
        for offset, end in zip(offsets, [*offsets[1:], len(response)]):
            row.append(b)
            start.append(len(prompt) + offset)
            tokens.append(torch.tensor(response[offset:end], dtype=torch.long))
    return _Blocks(
        row_K=torch.tensor(row, device=device),
        start_K=torch.tensor(start, device=device),
        length_K=torch.tensor([len(t) for t in tokens], device=device),
        fixed_KN=torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device),
    )


def _random_start(blocks: _Blocks, ids_BC: torch.Tensor, guess: FreshGuess, seed_B: torch.Tensor) -> torch.Tensor:
    positions = blocks.start_K[:, None] + torch.arange(blocks.fixed_KN.shape[1], device=ids_BC.device)
    state = guess(ids_BC[blocks.row_K], blocks.start_K, positions, seed_B[blocks.row_K])
    return torch.where(blocks.valid_KN, state, blocks.fixed_KN)


def _clean_cache(model: PreTrainedModel, ids_BC: torch.Tensor, layout: Layout) -> RowCache:
    cache = RowCache()
    slots = layout.position_BT.masked_fill(layout.block_BT == PADDING, -1)
    cache.place(slots, ids_BC.shape[1])
    model(
        input_ids=ids_BC,
        attention_mask=packed_mask(model.config, layout, layout, model.dtype),
        position_ids=layout.position_BT,
        **{cache_argument(model): cache},
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


def _iterate(model: PreTrainedModel, blocks: _Blocks, state_KN: torch.Tensor, cache: RowCache, clean: Layout) -> torch.Tensor:
    """One Jacobi iteration of every block that is not yet at its fixed point."""
    order_N = torch.arange(state_KN.shape[1], device=state_KN.device)
    wrong_KN = (state_KN != blocks.fixed_KN) & blocks.valid_KN
    first_K = torch.where(wrong_KN, order_N, state_KN.shape[1]).amin(dim=1)
    # Forwarding a guess gives the choice for the next position; guesses before the first wrong one are clean text.
    ask_KN = (order_N >= first_K[:, None]) & (order_N < blocks.length_K[:, None] - 1)
    following = state_KN.clone()
    if ask_KN.any():
        block, offset = ask_KN.nonzero(as_tuple=True)
        following[block, offset + 1] = _next_tokens(model, blocks, state_KN, first_K, block, offset, cache, clean)
    return torch.where(order_N <= first_K[:, None], blocks.fixed_KN, following)


def _next_tokens(
    model: PreTrainedModel,
    blocks: _Blocks,
    state_KN: torch.Tensor,
    first_K: torch.Tensor,
    block: torch.Tensor,
    offset: torch.Tensor,
    cache: RowCache,
    clean: Layout,
) -> torch.Tensor:
    """The model's choices after the guesses at (block, offset); each guess sees the clean text and its own block."""
    B, C = clean.position_BT.shape
    row = blocks.row_K[block]
    counts_B = torch.bincount(row, minlength=B)
    column = torch.arange(len(row), device=row.device) - (counts_B.cumsum(0) - counts_B)[row]

    def packed(values: torch.Tensor, padding: int) -> torch.Tensor:
        return values.new_full((B, int(counts_B.max())), padding).index_put_((row, column), values)

    queries = Layout(
        position_BT=packed(blocks.start_K[block] + offset, 0),
        horizon_BT=packed(blocks.start_K[block] + first_K[block], 1),
        block_BT=packed(block + 1, PADDING),
        document_BT=packed(torch.zeros_like(block), 0),
    )
    keys = clean.followed_by(queries)
    cache.place(packed(C + column, -1), keys.position_BT.shape[1])
    logits_BTV = model(
        input_ids=packed(state_KN[block, offset], 0),
        attention_mask=packed_mask(model.config, queries, keys, model.dtype),
        position_ids=queries.position_BT,
        **{cache_argument(model): cache},
        use_cache=True,
    ).logits
    return logits_BTV.argmax(dim=-1)[row, column]


def _unstack(history_KSN: torch.Tensor, blocks: _Blocks, steps_K: torch.Tensor, responses: int) -> list[list[States]]:
    """The states of each block, without padding and without repetitions of the fixed point."""
    result: list[list[States]] = [[] for _ in range(responses)]
    columns = torch.stack([blocks.row_K, steps_K, blocks.length_K], dim=1).tolist()
    for states_SN, (row, steps, length) in zip(history_KSN.cpu(), columns):
        result[row].append(states_SN[: steps + 1, :length].tolist())
    return result
