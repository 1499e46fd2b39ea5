"""Which tokens a training example packs, and what each learns."""

import random
from dataclasses import replace

import pytest

from cllm.errors import UsageError
from cllm.training.examples import ExampleDataset, StateSampling, build_example
from cllm.trajectory.record import TrajectoryRow

ROW = TrajectoryRow(
    row_id="a",
    prompt_ids=[1, 2, 3],
    response_ids=[10, 11, 12, 13, 14],
    block_starts=[0, 3],
    trajectories=[[[50, 51, 12], [10, 52, 12], [10, 11, 12]], [[13, 60], [13, 14]]],
    label_ids=[70, 71],
)


def build(row=ROW, seed=0, **options):
    return build_example(row, random.Random(seed), StateSampling(**options))


def seeds_where(predicate):
    found = [s for s in range(50) if predicate(build(seed=s))]
    assert found
    return found[0]


def test_the_right_prefix_of_a_state_is_not_packed():
    seed = seeds_where(lambda e: list(e.row.blocks[0].tokens) == [52, 12])
    example = build(seed=seed)
    block = example.row.blocks[0]
    assert block.start == 3 + 1  # after the prompt and one right guess
    assert example.row.clean == [1, 2, 3, 10, 11, 12, 13, 14]
    # Columns 8 and 9 hold positions 4 and 5, whose clean tokens are in columns 4 and 5.
    assert example.student[:2] == [8, 9]
    assert example.teacher[:2] == [4, 5]
    assert example.distance[:2] == [0, 1]


def test_the_final_token_predicts_nothing():
    """The second block's only wrong guess is the response's final token, and nothing follows it."""
    assert all(block.start < 6 for seed in range(20) for block in build(seed=seed).row.blocks)


def test_every_state_but_the_fixed_point_is_drawn():
    drawn = {tuple(build(seed=s).row.blocks[0].tokens) for s in range(50)}
    assert drawn == {(50, 51, 12), (52, 12)}


def test_a_row_at_its_fixed_point_has_no_consistency_tokens():
    row = TrajectoryRow("b", [1], [5, 6], [0], [[[5, 6]]])
    example = build(row)
    assert example.student == example.teacher == example.distance == []
    assert example.ar_target == [5, 6]


def positions(example):
    return [*range(len(example.row.clean)), *(b.start + i for b in example.row.blocks for i in range(len(b.tokens)))]


@pytest.mark.parametrize("context", range(4, 12))
@pytest.mark.parametrize(
    "options", [{"use_labels": True}, {"use_labels": True, "consistency": "local"}, {"random_block_size": True}], ids=str
)
def test_nothing_is_trained_on_beyond_the_context(options, context):
    long = replace(ROW, label_ids=list(range(70, 90)))
    data = ExampleDataset([long], StateSampling(**options), context=context)
    for data.epoch in range(10):
        example = data[0]
        assert max(positions(example)) < context
        assert example.ar_target == (long.label_ids if options.get("use_labels") else ROW.response_ids)[: context - 3]
        assert len(example.ar_index) == len(example.ar_target)


def test_a_context_leaves_a_row_that_fits_unchanged():
    with_context, without = (ExampleDataset([ROW], StateSampling(use_labels=True), context=c)[0] for c in (8, None))
    assert with_context == without


def test_several_states_per_block():
    example = build(states_per_block=5)
    assert sorted(tuple(b.tokens) for b in example.row.blocks) == [(50, 51, 12), (52, 12)]
    assert len(example.student) == len(example.teacher) == len(example.distance) == 5


def test_local_consistency_learns_from_the_next_state():
    seed = next(s for s in range(50) if list(build(seed=s, consistency="local").row.blocks[0].tokens) == [50, 51, 12])
    example = build(seed=seed, consistency="local")
    state, goal = example.row.blocks[:2]
    assert (state.start, list(goal.tokens), goal.start) == (3, [52, 12], 4)
    # Position 3 is right in the next state, so the clean text (column 3) teaches; the rest is taught by the next state.
    assert example.student[:3] == [8, 9, 10]
    assert example.teacher[:3] == [3, 11, 12]


def test_ar_on_the_response():
    example = build()
    assert example.ar_index == [2, 3, 4, 5, 6]
    assert example.ar_target == [10, 11, 12, 13, 14]


def test_ar_on_labels_packs_them_after_the_prompt():
    example = build(use_labels=True)
    block = example.row.blocks[-1]
    assert (block.start, list(block.tokens)) == (3, [70])
    assert example.ar_index == [2, len(example.row) - 1]
    assert example.ar_target == [70, 71]


STATES = [[[*range(at, at + known), *[90] * (4 - known)] for known in range(5)] for at in (10, 14)]
WIDE = TrajectoryRow("w", [1], list(range(10, 22)), [0, 4, 8], [*STATES, [[18, 19, 20, 21]]])  # 4 to 1 wrong guesses


def wrong_shares(example) -> list[float]:
    return [len(block.tokens) / 4 for block in example.row.blocks]


def test_noise_ratios_choose_the_nearest_state_and_rise_from_block_to_block():
    shares = [wrong_shares(build(WIDE, seed, choice="noise")) for seed in range(300)]
    assert {share for pair in shares for share in pair} == {0.25, 0.5, 0.75, 1.0}
    steps = [second - first for first, second in shares]
    assert set(steps) == {0.0, 0.25, -0.75}  # a sixteenth higher, or wrapped around
    assert steps.count(0.0) > steps.count(0.25) > 0


def test_several_noise_ratios_draw_no_state_twice():
    assert all(
        sorted(wrong_shares(build(WIDE, seed, choice="noise", states_per_block=9))) == sorted(2 * [0.25, 0.5, 0.75, 1.0])
        for seed in range(20)
    )


def test_a_random_block_size_truncates_all_blocks_of_a_response_alike():
    widths = set()
    for seed in range(40):
        example = build(WIDE, seed, random_block_size=True, states_per_block=9)
        ends = [block.start - 1 + len(block.tokens) for block in example.row.blocks]  # in the response
        (width,) = {end - 4 * (end > 4) for end in ends}
        assert len(ends) == 2 * width  # each state of the narrower blocks that has a wrong guess, once
        widths.add(width)
    assert widths == {1, 2, 3, 4}


@pytest.mark.parametrize("options", [{}, {"choice": "noise"}, {"random_block_size": True}], ids=str)
def test_states_depend_only_on_seed_epoch_and_row(options):
    dataset = ExampleDataset([ROW] * 20, StateSampling(**options), seed=1)
    first = [dataset[i] for i in range(20)]
    assert [dataset[i] for i in reversed(range(20))][::-1] == first
    dataset.epoch = 1
    assert [dataset[i] for i in range(20)] != first


def test_labels_are_required():
    row = TrajectoryRow("b", [1], [5, 6], [0], [[[7, 6], [5, 6]]])
    with pytest.raises(UsageError, match="--use_labels"):
        ExampleDataset([row], StateSampling(use_labels=True))
    labelled = TrajectoryRow("c", [1], [5, 6], [0], [[[7, 6], [5, 6]]], [], [8, 9])
    examples = ExampleDataset([row, labelled], StateSampling(use_labels=True))  # a published file may lack some labels
    assert [(len(e.ar_index), e.ar_target) for e in (examples[0], examples[1])] == [(0, []), (2, [8, 9])]
