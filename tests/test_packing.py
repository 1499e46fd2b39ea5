"""A packed forward equals separate plain forwards."""

import random

import pytest
import torch
from tiny import KINDS, tiny_model

from cllm.packing import Block, PackedRow, pack, packed_mask


def random_row(draw: random.Random) -> PackedRow:
    clean = [draw.randrange(1, 97) for _ in range(draw.randint(4, 40))]
    blocks = []
    for _ in range(draw.randint(0, 5)):
        tokens = [draw.randrange(1, 97) for _ in range(draw.randint(1, 9))]
        blocks.append(Block(draw.randint(1, len(clean)), tokens))
    return PackedRow(clean, blocks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_logits_equal_plain_forwards(kind, seed):
    draw, model = random.Random(f"{kind} {seed}"), tiny_model(kind, seed)
    rows = [random_row(draw) for _ in range(draw.randint(1, 5))]
    ids, layout = pack(rows, pad_token_id=0)
    logits = model(
        input_ids=ids,
        attention_mask=packed_mask(model.config, layout, layout, model.dtype),
        position_ids=layout.position_BT,
        use_cache=False,
    ).logits
    assert torch.isfinite(logits).all()  # padding included: a query that sees nothing would give NaN
    for b, row in enumerate(rows):
        plain = model(torch.tensor([row.clean])).logits[0]
        torch.testing.assert_close(logits[b, : len(row.clean)], plain, atol=1e-4, rtol=1e-4)
        for block, at in zip(row.blocks, row.offsets()):
            text = [*row.clean[: block.start], *block.tokens]
            plain = model(torch.tensor([text])).logits[0, block.start :]
            torch.testing.assert_close(logits[b, at : at + len(block.tokens)], plain, atol=1e-4, rtol=1e-4)


def test_length_and_offsets():
    row = PackedRow([1, 2, 3], [Block(1, [4, 5]), Block(2, [6])])
    assert len(row) == 6
    assert row.offsets() == [3, 5]
    ids, layout = pack([row, PackedRow([7])], pad_token_id=9)
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 9, 9, 9, 9, 9]]
    assert layout.position_BT[0].tolist() == [0, 1, 2, 1, 2, 2]
