"""A packed forward equals separate plain forwards."""

import random

import pytest
import torch
from tiny import KINDS, tiny_model

from cllm.attention import FLEX
from cllm.packing import PADDING, Block, Layout, PackedRow, arrange, pack, pack_alike, packed_mask


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
    assert torch.isfinite(logits).all()  # padding included: a query that sees no key would give NaN
    for b, row in enumerate(rows):
        plain = model(torch.tensor([row.clean])).logits[0]
        torch.testing.assert_close(logits[b, : len(row.clean)], plain, atol=1e-4, rtol=1e-4)
        for block, at in zip(row.blocks, row.offsets()):
            text = [*row.clean[: block.start], *block.tokens]
            plain = model(torch.tensor([text])).logits[0, block.start :]
            torch.testing.assert_close(logits[b, at : at + len(block.tokens)], plain, atol=1e-4, rtol=1e-4)


def hidden(model, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
    mask = packed_mask(model.config, layout, layout, model.dtype)
    return model(
        input_ids=ids, attention_mask=mask, position_ids=layout.position_BT, use_cache=False, output_hidden_states=True
    ).hidden_states[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_in_one_row_do_not_see_each_other(kind):
    """Hidden states and gradients equal those of each text alone."""
    draw, model = random.Random(kind), tiny_model(kind)
    texts = [random_row(draw) for _ in range(5)]
    places = arrange(texts, budget=150)
    together = hidden(model, *pack(texts, 0, places))
    assert together.shape[0] < len(texts)
    parts = [together[row, columns] for row, columns in places]
    alone = [hidden(model, *pack([text], 0))[0] for text in texts]
    weights = [torch.randn(part.shape) for part in parts]
    gradients = []
    for found in (parts, alone):
        sum((part * weight).sum() for part, weight in zip(found, weights, strict=True)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    for packed, single in zip([*parts, gradients[0]], [*alone, gradients[1]], strict=True):
        torch.testing.assert_close(packed, single, atol=1e-4 * float(single.detach().abs().max()), rtol=1e-4)


@pytest.mark.parametrize("budget", [0, 1, 60, 150, 10_000])
def test_texts_get_disjoint_places_within_the_budget(budget):
    draw = random.Random(budget)
    texts = [random_row(draw) for _ in range(12)]
    places = arrange(texts, budget)
    taken = [(place.row, column) for place in places for column in place.columns]
    assert len(taken) == len(set(taken)) == sum(map(len, texts))
    for row in range(1 + max(place.row for place in places)):
        members = [(text, place) for text, place in zip(texts, places) if place.row == row]
        columns = sorted(column for _, place in members for column in place.columns)
        assert columns == list(range(len(columns)))
        assert len(members) == 1 or len(columns) <= budget
        clean = sum(len(text.clean) for text, _ in members)
        assert all(max(place.columns[: len(text.clean)]) < clean for text, place in members)
    if budget <= 1:
        assert [place.row for place in places] == list(range(12))


@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_gets_the_same_visibility(kind):
    """The computed blocks and the mask function within them give the mask that SDPA gets."""
    draw = random.Random(kind)
    texts = [random_row(draw) for _ in range(9)]
    _, layout = pack(texts, 0, arrange(texts, budget=300))
    config = tiny_model(kind).config
    dense = packed_mask(config, layout, layout, torch.float32)
    config._attn_implementation = FLEX
    sparse = packed_mask(config, layout, layout, torch.float32)
    pairs = [(dense[name], sparse[name]) for name in dense] if isinstance(dense, dict) else [(dense, sparse)]
    for added_B1TT, block_mask in pairs:
        mask_B1TT = added_B1TT == 0
        B, _, T, _ = mask_B1TT.shape
        assert block_mask.shape == (B, 1, T, T)
        indices = torch.meshgrid(torch.arange(B), torch.arange(1), torch.arange(T), torch.arange(T), indexing="ij")
        assert torch.equal(block_mask.mask_mod(*indices), mask_B1TT)
        size = block_mask.BLOCK_SIZE[0]
        computed = block_mask.to_dense().bool().repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :T, :T]
        assert not (mask_B1TT & ~computed).any()


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_gives_the_hidden_states_of_sdpa():
    """Forward only, since FlexAttention has no backward pass on a CPU."""
    draw, model = random.Random(0), tiny_model()
    texts = [random_row(draw) for _ in range(6)]
    ids, layout = pack(texts, 0, arrange(texts, budget=150))
    expected = hidden(model, ids, layout)
    model.set_attn_implementation(FLEX)
    torch.testing.assert_close(hidden(model, ids, layout), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "gemma3"])  # compiling takes most of the time
def test_flex_attention_gives_the_gradients_of_sdpa(kind):
    draw, model = random.Random(kind), tiny_model(kind, hidden_size=64, head_dim=16).cuda()
    texts = [random_row(draw) for _ in range(6)]
    ids, layout = pack(texts, 0, arrange(texts, budget=150))
    ids, layout = ids.cuda(), layout.to("cuda")
    real = layout.block_BT >= 0
    gradients = []
    for attention in ("sdpa", FLEX):
        model.set_attn_implementation(attention)
        hidden(model, ids, layout)[real].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-2 * float(gradients[0].abs().max()), rtol=1e-2)


def test_length_and_offsets():
    row = PackedRow([1, 2, 3], [Block(1, [4, 5]), Block(2, [6])])
    assert len(row) == 6
    assert row.offsets() == [3, 5]
    ids, layout = pack([row, PackedRow([7])], pad_token_id=9)
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 9, 9, 9, 9, 9]]
    assert layout.position_BT[0].tolist() == [0, 1, 2, 1, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_texts_that_begin_alike_share_that_and_equal_plain_forwards(kind):
    draw, model = random.Random(kind), tiny_model(kind)
    one, two = ([draw.randrange(1, 97) for _ in range(length)] for length in (40, 30))
    texts = [[*one, 1, 2], [5, 6], [*two, 3], [*one, 3, 4, 5], one, [*two, 4, 4]]
    ids, layout, places = pack_alike(texts, 0)
    assert (layout.block_BT != PADDING).sum() == (39 + 3 + 4 + 1) + (30 + 1 + 2) + 2 and len(ids) == 2
    assert [ids[row, list(columns)].tolist() for row, columns in places] == texts
    mask = packed_mask(model.config, layout, layout, model.dtype)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=layout.position_BT, use_cache=False).logits
    for text, (row, columns) in zip(texts, places, strict=True):
        torch.testing.assert_close(logits[row, list(columns)], model(torch.tensor([text])).logits[0], atol=1e-4, rtol=1e-4)


def test_a_shared_beginning_that_would_make_attention_dearer_is_repeated():
    texts = [[*range(20), *range(30 * n, 30 * n + 30)] for n in range(1, 4)]
    ids, layout, _ = pack_alike(texts, 0)
    assert (layout.block_BT != PADDING).sum() == sum(map(len, texts)) and len(ids) == 3
