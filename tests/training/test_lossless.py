"""Training a consistency adapter: its loss, its gradient under any split of the batch, and what it leaves unchanged."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch.nn import Module
from training.test_trainer import ROWS, SHOWN, in_two_processes, loss_sums, prepare, random_row
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from cllm.adapter import attached, read_adapter
from cllm.cli.command import leave_process_group
from cllm.decoding.guess import STARTS
from cllm.errors import UsageError
from cllm.evaluation.probe import DraftProbe
from cllm.packing import CLEAN, PADDING, Block, PackedRow
from cllm.training.arguments import LosslessTrainingArguments
from cllm.training.drafts import DraftCollator, DraftDataset, DraftExample
from cllm.training.lora import AdapterArguments, add_adapter, current_adapter
from cllm.training.lossless import LosslessTrainer
from cllm.training.objective import kl_divergence
from cllm.trajectory.record import TrajectoryRow

pytest.importorskip("peft")
IDS = torch.arange(3, 20)[None]
SPLITS = [(4, 2), (2, 4), (1, 8)]  # batch size and accumulation


def draft_model(kind: str = "llama", **changes):
    """A tiny model with a nonzero adapter."""
    model = add_adapter(tiny_model(kind, vocab_size=97, **changes), AdapterArguments(lora_r=4), seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return model


def dataset(rows: list[TrajectoryRow], states_per_block: int = 2, guess: str = "context", block_size: int = 4) -> DraftDataset:
    return DraftDataset(rows, block_size, states_per_block, STARTS[guess](97))


def make_trainer(folder: Path, model=None, rows: list[TrajectoryRow] | None = None, **options) -> LosslessTrainer:
    args = LosslessTrainingArguments(output_dir=str(folder), **SHOWN | options)
    return LosslessTrainer(
        model=model or draft_model(),
        args=args,
        train_dataset=dataset(rows or list(map(random_row, range(ROWS))), args.states_per_block),
        data_collator=DraftCollator(0),
    )


def learned(model: Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])


def step(folder: Path, **options) -> torch.Tensor:
    """The change of the adapter after one optimizer step over all rows."""
    model = draft_model()
    before = learned(model)
    make_trainer(folder, model, **options).train()
    return learned(model) - before


def merged(kind: str, model: Module) -> Module:
    """A plain model with the adapter merged into its weights."""
    copy, adapter = tiny_model(kind, vocab_size=97), current_adapter(model)
    layers = dict(copy.named_modules())
    for name, down in adapter.down.items():
        layers[name].weight.data += adapter.up[name] @ down
    return copy


def plain_loss(base: Module, draft: Module, example: DraftExample, decay: float) -> float:
    """Block by block over the base's own keys and values, without a packed layout."""
    teacher, loss = base(torch.tensor([example.row.clean])).logits[0], 0.0
    for block, wrong in zip(example.row.blocks, example.first_wrong, strict=True):
        cache = DynamicCache()
        base(torch.tensor([example.row.clean[: block.start]]), past_key_values=cache)
        drafted = draft(torch.tensor([block.tokens]), past_key_values=cache).logits[0, wrong:]
        goal = teacher[block.start + wrong : block.start + len(block.tokens)]
        loss += (kl_divergence(goal, drafted) * decay ** torch.arange(len(goal))).sum().item()
    return loss


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
@torch.no_grad()
def test_equals_plain_forwards(tmp_path, kind: str) -> None:
    """Also for texts that begin alike."""
    model, rows = draft_model(kind), list(map(random_row, range(ROWS)))
    rows[1:4] = [replace(row, prompt_ids=[*range(20, 60), *row.prompt_ids]) for row in rows[1:4]]
    trainer = make_trainer(tmp_path, model, rows)
    examples = [trainer.train_dataset[index] for index in range(ROWS)]
    model.train()
    base, draft = tiny_model(kind, vocab_size=97), merged(kind, model)
    found = [loss_sums(trainer, [example])[0] for example in examples]
    expected = [plain_loss(base, draft, example, 0.8) for example in examples]
    assert found == pytest.approx(expected, rel=1e-3) and min(found) > 0
    assert loss_sums(trainer, examples) == pytest.approx([sum(expected)], rel=1e-3)


def test_texts_that_begin_alike_are_read_once() -> None:
    texts = [[*range(40), 1, 2], [5, 6], [*range(40), 3, 4, 5]]
    batch = DraftCollator(0)([DraftExample(PackedRow(text, [Block(1, [7])]), [0]) for text in texts])
    assert (batch["clean_block"] != PADDING).sum() == 40 + 2 + 3 + 2
    assert (batch["block"] == CLEAN).sum() == sum(map(len, texts))


def test_accumulation_and_batch_size_do_not_change_the_gradient(tmp_path) -> None:
    whole = step(tmp_path, per_device_train_batch_size=8)
    assert whole.abs().max() > 1e-3
    for size, accumulation in SPLITS:
        split = step(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_near_float32(tmp_path) -> None:
    exact, rounded = (step(tmp_path, per_device_train_batch_size=8, bf16=bf16) for bf16 in (False, True))
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_two_processes_give_the_gradient_of_one(tmp_path, kind: str) -> None:
    if kind == "zero2":
        pytest.importorskip("deepspeed")
    model = draft_model()
    make_trainer(tmp_path, model, per_device_train_batch_size=8).train()
    in_two_processes(__file__, tmp_path, kind)
    alone, together = current_adapter(model), read_adapter(tmp_path)
    for name in alone.down:
        torch.testing.assert_close(together.down[name], alone.down[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.up[name], alone.up[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_resumed_training_equals_uninterrupted(tmp_path, strategy: str) -> None:
    options = dict(optim="adamw_torch", learning_rate=1e-3, max_steps=7, save_strategy="steps", save_steps=1)
    options |= dict(per_device_train_batch_size=2, train_sampling_strategy=strategy)
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    for at in (3, 5):
        resumed = make_trainer(tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
        assert torch.equal(learned(whole.model), learned(resumed.model))


def test_the_target_model_is_unchanged(tmp_path) -> None:
    """Bit for bit, in its weights and its logits."""
    base, model = tiny_model(vocab_size=97), draft_model()
    make_trainer(tmp_path, model, max_steps=3, learning_rate=0.1).train()
    trained = {name.replace(".base_layer", ""): weight for name, weight in model.get_base_model().named_parameters()}
    assert all(torch.equal(trained[name], weight) for name, weight in base.named_parameters())
    with model.disable_adapter():
        assert torch.equal(model.eval()(IDS).logits, base(IDS).logits)
    assert not torch.equal(learned(model), learned(draft_model()))


def test_the_teacher_has_no_dropout(tmp_path) -> None:
    model = draft_model(attention_dropout=0.5)
    trainer = make_trainer(tmp_path, model)
    seen: list[torch.Tensor] = []
    model.get_base_model().model.norm.register_forward_hook(lambda layer, args, output: seen.append(output))
    model.train()
    for _ in range(2):
        loss_sums(trainer, [trainer.train_dataset[0]])
    first_clean, first_blocks, second_clean, second_blocks = seen
    assert torch.equal(first_clean, second_clean) and not torch.equal(first_blocks, second_blocks) and model.training


def test_training_lowers_the_loss(tmp_path) -> None:
    trainer = make_trainer(tmp_path, optim="adamw_torch", learning_rate=1e-2, max_steps=30, logging_steps=10)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert 0 < trainer.evaluate(trainer.train_dataset)["eval_loss"] < losses[0]


@pytest.mark.parametrize("guess", STARTS)
def test_blocks_start_from_random_guesses(guess: str) -> None:
    """Whatever states are stored."""
    rows = list(map(random_row, range(ROWS)))
    drafts, again = dataset(rows, guess=guess), dataset(rows, guess=guess)
    again.epoch = 1
    outside: set[int] = set()
    bare = dataset([replace(row, trajectories=[states[-1:] for states in row.trajectories]) for row in rows], guess=guess)
    for index, row in enumerate(rows):
        example = drafts[index]
        assert example == drafts[index] == bare[index]
        for block, wrong in zip(example.row.blocks, example.first_wrong, strict=True):
            fixed = row.response_ids[block.start - len(row.prompt_ids) :]
            assert list(block.tokens[:wrong]) == fixed[:wrong] and block.tokens[wrong] != fixed[wrong]
            known = set((row.prompt_ids + row.response_ids)[: block.start])
            allowed = {"context": known, "uniform": set(range(97)), "filler": {0}}[guess]
            assert set(block.tokens) <= allowed
            outside |= set(block.tokens) - known
    assert (len(outside) > 9) == (guess == "uniform")
    assert any(drafts[index] != again[index] for index in range(ROWS))


def test_a_response_is_cut_into_blocks_of_random_lengths() -> None:
    """Each cut covers the response but for its last token, which predicts nothing."""
    row = TrajectoryRow("a", [1, 2, 3], list(range(10, 50)), [0], [[list(range(10, 50))]])
    drafts, lengths = dataset([row], states_per_block=2, guess="filler", block_size=8), Counter()
    for drafts.epoch in range(100):
        blocks = drafts[0].row.blocks
        covered = [token for block in blocks for token in range(block.start, block.start + len(block.tokens))]
        assert covered == 2 * list(range(3, 42))
        second = [block.start for block in blocks].index(3, 1)
        assert [block.start for block in blocks[:second]] != [block.start for block in blocks[second:]]
        lengths.update(len(block.tokens) for block in blocks[: second - 1])
    assert set(lengths) == set(range(1, 9)) and min(lengths.values()) > 0.5 * max(lengths.values())


def test_a_row_with_nothing_to_learn(tmp_path) -> None:
    trainer = make_trainer(tmp_path, rows=[TrajectoryRow("a", [5, 6], [7], [0], [[[7]]])])
    example = trainer.train_dataset[0]
    assert (example.first_wrong, list(example.row.blocks[0].tokens)) == ([1], [7])
    assert loss_sums(trainer, [example]) == [0.0]
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_log_counts_clean_text_and_blocks(tmp_path) -> None:
    trainer = make_trainer(tmp_path, per_device_train_batch_size=8, logging_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(ROWS)])
    trainer.train()
    useful = sum(len(example.row) for example in map(trainer.train_dataset.__getitem__, range(ROWS)))
    share = useful / (batch["clean_input_ids"].numel() + batch["input_ids"].numel())
    assert trainer.state.log_history[0]["useful_tokens"] == pytest.approx(share, abs=1e-4)


def test_probes_measure_the_target_with_the_current_adapter() -> None:
    model = draft_model()
    base, plain = model.get_base_model(), tiny_model(vocab_size=97)
    seen = []

    def measure(measured):
        assert measured is base and torch.equal(measured(IDS).logits, plain(IDS).logits)
        seen.append(attached(measured))

    check = DraftProbe(measure, model)
    check(model)
    check(base)
    adapter = current_adapter(model)
    assert seen[1] is None and attached(base) is None
    assert all(torch.equal(seen[0].up[name], up) for name, up in adapter.up.items()) and len(adapter.up) == 3 * 2
    assert learned(model).numel() == adapter.parameters


def test_invalid_set_ups_are_refused(tmp_path) -> None:
    for options, message in [
        ({"gradient_checkpointing": True}, "gradient_checkpointing is on: .* leave it out"),
        ({"label_smoothing_factor": 0.1}, "lossless training has none"),
        ({"distance_decay": 0.0}, "distance_decay must be above 0 and at most 1, got 0.0"),
        ({"states_per_block": 0}, "states_per_block must be >= 1, got 0"),
    ]:
        with pytest.raises(UsageError, match=message):
            make_trainer(tmp_path, **options)
    with pytest.raises(UsageError, match="flex_attention.*explicit masks need one of sdpa, eager"):
        make_trainer(tmp_path, draft_model(attn_implementation="flex_attention"))
    with pytest.raises(ValueError, match="needs a model with an adapter"):
        make_trainer(tmp_path, tiny_model())
    with pytest.raises(UsageError, match="lora_r must be >= 1, got 0"):
        AdapterArguments(lora_r=0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="no torch.nn.Linear layers, which adapters need"):
        add_adapter(gpt2, AdapterArguments(), seed=0)


if __name__ == "__main__":  # one of two processes of test_two_processes_give_the_gradient_of_one
    prepare(LosslessTrainer)
    together = make_trainer(sys.argv[1], per_device_train_batch_size=2, gradient_accumulation_steps=2)
    together.train()
    assert together.args.world_size == 2
    together.save_model()
    leave_process_group()
