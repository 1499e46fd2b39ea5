"""States of the model in training: the drawn ones, taken on by Jacobi iteration."""

import pytest
import torch
from tiny import tiny_model

from cllm.decoding import JacobiDecoder
from cllm.training.arguments import CllmTrainingArguments
from cllm.training.examples import Collator, ExampleDataset
from cllm.training.policy import learn_where_wrong
from cllm.training.trainer import CllmTrainer
from cllm.trajectory.record import TrajectoryRow
from cllm.trajectory.states import block_starts, jacobi_states

ROWS, DECAY = 8, 0.8


class Rows(list):
    settings = None


def own_rows(model, size: int = 6) -> Rows:
    """Trajectories that the model itself made, from bad starting guesses."""
    prompts = [[3 + n, 5, 7 * n + 4] for n in range(ROWS)]
    responses = [r.token_ids for r in JacobiDecoder(model, 1).generate(prompts, max_new_tokens=20)]
    starts = [block_starts(20, size, n % size) for n in range(ROWS)]
    states = jacobi_states(model, prompts, responses, starts, seeds=range(ROWS))
    return Rows(map(TrajectoryRow, map(str, range(ROWS)), prompts, responses, starts, states))


def states_of(batch) -> list[list[int]]:
    """The tokens of every block, in order."""
    pairs = zip(batch["block"], batch["input_ids"])
    return [ids[block == number].tolist() for block, ids in pairs for number in range(1, int(block.max()) + 1)]


def trainer_of(folder, model, iterations: int):
    args = CllmTrainingArguments(
        str(folder), on_policy=iterations, states_per_block=1, distance_decay=DECAY, use_cpu=True, report_to="none"
    )
    data = ExampleDataset(own_rows(tiny_model(seed=1, vocab_size=97)), args.sampling)
    target = tiny_model(vocab_size=97)
    trainer = CllmTrainer(model, args, data_collator=Collator(0, DECAY), train_dataset=data, target_model=target)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(ROWS)])
    return trainer, batch


@pytest.mark.parametrize("iterations", [1, 2])
def test_equals_the_iterations_of_the_collection(tmp_path, iterations):
    """The states of the very model that made the trajectories become the states that follow them there."""
    model = tiny_model(seed=1, vocab_size=97)
    trainer, batch = trainer_of(tmp_path, model, iterations)
    following = {}
    for row in trainer.train_dataset.rows:
        for block, (start, _) in enumerate(row.spans()):
            states, at = row.trajectories[block], len(row.prompt_ids) + start
            for number, state in enumerate(states[:-1]):
                wrong = next(i for i, (a, b) in enumerate(zip(state, states[-1])) if a != b)
                later = states[min(number + iterations, len(states) - 1)]
                last = len(row.response_ids) - 1 - start
                following[tuple(row.prompt_ids), at + wrong, tuple(state[wrong:last])] = later[wrong:last]
    examples = [trainer.train_dataset[index] for index in range(ROWS)]
    keys = [(tuple(e.row.clean[:3]), b.start, tuple(b.tokens)) for e in examples for b in e.row.blocks]
    assert len(keys) > 20
    assert states_of(trainer.on_policy(batch)) == [following[key] for key in keys]


def test_the_loss_is_taken_from_the_first_wrong_guess_on(tmp_path):
    trainer, drawn = trainer_of(tmp_path, tiny_model(seed=1, vocab_size=97), 1)
    batch = trainer.on_policy(drawn)
    expected = []
    for row, (ids, block, position) in enumerate(zip(batch["input_ids"], batch["block"], batch["position"])):
        for number in range(1, int(block.max()) + 1):
            columns = (block == number).nonzero().flatten().tolist()
            wrong = [at for at in columns if ids[at] != ids[position[at]]]
            expected += [(row, at, DECAY ** (at - wrong[0])) for at in columns if wrong and at >= wrong[0]]
    assert 0 < len(expected) < len(drawn["student"])
    got = [(*pair, weight) for pair, weight in zip(batch["student"].tolist(), batch["weight"].tolist())]
    assert [pair[:2] for pair in got] == [pair[:2] for pair in expected]
    assert [pair[2] for pair in got] == pytest.approx([pair[2] for pair in expected])
    rows, columns = batch["teacher"].unbind(1)
    assert torch.equal(columns, batch["position"][batch["student"].unbind(1)]) and torch.equal(rows, batch["student"][:, 0])


def test_drawn_states_are_already_wrong_from_their_first_token(tmp_path):
    """Nothing changes without an iteration, so K = 0 is the limit of the option and not another objective."""
    _, batch = trainer_of(tmp_path, tiny_model(seed=1, vocab_size=97), 1)
    same = learn_where_wrong(batch, DECAY)
    assert all(torch.equal(same[name], batch[name]) for name in ("student", "teacher", "weight", "input_ids"))


def test_another_models_states_reach_the_fixed_point_too(tmp_path):
    """Every iteration makes one more guess right, whatever the model in training would write."""
    trainer, drawn = trainer_of(tmp_path, tiny_model(seed=5, vocab_size=97), 1)
    left = [len(drawn["student"])]
    for trainer.args.on_policy in range(1, 7):
        left.append(len(trainer.on_policy(drawn)["student"]))
    assert all(later < earlier or earlier == 0 for earlier, later in zip(left, left[1:]))
    assert left[-1] == 0 and trainer.loss_sums(trainer.model, trainer.on_policy(drawn))[0] == 0.0
