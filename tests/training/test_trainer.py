"""The trainer's gradients: correct, and the same under any split of the global batch."""

import os
import random
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, PartialState
from tiny import tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from cllm import reference
from cllm.cli.command import leave_process_group
from cllm.errors import UsageError
from cllm.training.arguments import CllmTrainingArguments
from cllm.training.base import TokenMeanTrainer
from cllm.training.examples import Collator, ExampleDataset, StateSampling, build_example
from cllm.training.lora import LoraArguments, add_adapter
from cllm.training.objective import DIVERGENCES
from cllm.training.trainer import CllmTrainer
from cllm.trajectory.record import TrajectoryRow

ROWS = 8
TESTS = Path(__file__).parents[1]
CONFIGS = TESTS.parent / "cllm" / "configs"


def random_row(index: int) -> TrajectoryRow:
    draw = random.Random(index)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 97) for _ in range(count)]

    prompt, response, size = tokens(draw.randint(2, 9)), tokens(draw.randint(5, 14)), draw.randint(2, 5)
    starts = list(range(0, len(response), size))
    trajectories = []
    for start in starts:
        fixed = response[start : start + size]
        trajectories.append([[*fixed[:known], *tokens(len(fixed) - known)] for known in range(len(fixed))] + [fixed])
    return TrajectoryRow(f"row-{index}", prompt, response, starts, trajectories, [], tokens(4))


SHOWN = dict(  # one optimizer step exposes the gradient: plain SGD without momentum at learning rate 1
    per_device_train_batch_size=4,
    optim="sgd",
    learning_rate=1.0,
    lr_scheduler_type="constant",
    warmup_steps=0,
    max_grad_norm=0.0,
    max_steps=1,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    seed=3,
)


def make_trainer(folder, model=None, rows: int = ROWS, **options) -> CllmTrainer:
    model, target = model or tiny_model(vocab_size=97), tiny_model(seed=9, vocab_size=97)  # unsharded: built before ZeRO-3 is configured
    args = CllmTrainingArguments(output_dir=str(folder), **SHOWN | options)
    return CllmTrainer(
        model=model,
        args=args,
        train_dataset=ExampleDataset(list(map(random_row, range(rows))), args.state_sampling),
        data_collator=Collator(0, args.distance_decay, args.max_row_tokens),
        target_model=target if args.needs_target else None,
    )


def step(folder, **options) -> torch.Tensor:
    """The change of all weights after one optimizer step over all rows."""
    model = tiny_model(vocab_size=97)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    make_trainer(folder, model, **options).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


OBJECTIVES = [
    {},
    {"consistency": "local"},
    {"teacher": "self", "ar_loss": "fixed_point"},
    {"teacher": "self", "use_gt_labels": True},
    {"divergence": "reverse_kl", "state_choice": "noise"},
    {"divergence": "hard", "random_block_size": True, "ar_loss": "fixed_point", "label_smoothing_factor": 0.1},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_accumulation_and_batch_size_do_not_change_the_gradient(tmp_path, objective):
    whole = step(tmp_path, per_device_train_batch_size=8, **objective)
    assert whole.abs().max() > 1e-3
    for size, accumulation in [(4, 2), (2, 4), (1, 8)]:
        split = step(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **objective)
        torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-4)


def test_the_evaluation_loss_is_one_mean_over_all_tokens(tmp_path):
    losses = []
    for size in (1, 3, ROWS):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=size)
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses == pytest.approx([losses[-1]] * 3, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_examples_that_share_rows_have_the_same_gradient(tmp_path, objective):
    whole = step(tmp_path, per_device_train_batch_size=8, **objective)
    shared = step(tmp_path, per_device_train_batch_size=8, max_row_tokens=150, **objective)
    torch.testing.assert_close(shared, whole, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_near_float32(tmp_path):
    exact, rounded = (step(tmp_path, per_device_train_batch_size=8, max_row_tokens=150, bf16=bf16) for bf16 in (False, True))
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


def test_gradient_checkpointing_does_not_change_the_gradient(tmp_path):
    torch.testing.assert_close(step(tmp_path, gradient_checkpointing=True, max_row_tokens=150), step(tmp_path), atol=1e-5, rtol=1e-4)


SHARDED = {"ddp": None, "fsdp2": "fsdp2.yaml", "zero2": "zero2.yaml", "zero3": "zero3.yaml"}  # in cllm/configs


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARDED)
def test_two_processes_give_the_gradient_of_one(tmp_path, kind):
    """The accumulated, packed step is the same, and however the weights are sharded, the result is one plain checkpoint."""
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    model = tiny_model(vocab_size=97)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    make_trainer(tmp_path, model, per_device_train_batch_size=8).train()
    in_two_processes(__file__, tmp_path, kind)
    together = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(together[name] - before[name], weight - before[name], atol=1e-5, rtol=1e-4)


def in_two_processes(script: str, folder: Path, kind: str) -> None:
    """Run ``script folder`` under accelerate with one of the configurations SHARDED."""
    config = ["--config_file", str(CONFIGS / SHARDED[kind])] if SHARDED[kind] else ["--multi_gpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "--num_processes=2", "--main_process_port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    subprocess.run([*command, script, str(folder)], check=True, env=environment, timeout=500)


def loss_sums(trainer: TokenMeanTrainer, examples) -> list[float]:
    batch = trainer.data_collator(examples)
    return trainer.loss_sums(trainer.model, batch).tolist()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_padding_and_packing_do_not_change_the_loss(tmp_path, objective):
    trainer = make_trainer(tmp_path, **objective)
    examples = [trainer.train_dataset[i] for i in range(ROWS)]
    alone = torch.tensor([loss_sums(trainer, [e]) for e in examples]).sum(dim=0)
    assert torch.allclose(torch.tensor(loss_sums(trainer, examples)), alone, rtol=1e-5)


def test_equals_the_papers_plain_forwards(tmp_path):
    """Self teacher, global consistency, AR on the fixed point, no distance decay: three plain forwards per block."""
    trainer = make_trainer(tmp_path, teacher="self", ar_loss="fixed_point", distance_decay=1.0, states_per_block=1)
    for index in range(ROWS):
        row = random_row(index)
        for block, (start, _) in enumerate(row.spans()):
            only = TrajectoryRow(
                row.row_id,
                row.prompt_ids,
                row.response_ids,
                row.block_starts,
                [t if b == block else t[-1:] for b, t in enumerate(row.trajectories)],
            )
            example = build_example(only, random.Random(0), StateSampling())
            state = random.Random(0).sample(range(len(row.trajectories[block]) - 1), 1)[0]
            expected = reference.training_losses(
                trainer.model,
                row.prompt_ids,
                row.response_ids,
                reference.ReferenceBlock(row.prompt_ids + row.response_ids[:start], row.trajectories[block]),
                state,
            )
            assert loss_sums(trainer, [example]) == pytest.approx([x.item() for x in expected[:2]], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_equals_plain_forwards(tmp_path, divergence):
    trainer = make_trainer(tmp_path, divergence=divergence, distance_decay=1.0)
    for index in range(ROWS):
        example, expected = trainer.train_dataset[index], 0.0
        clean = torch.tensor([example.row.clean])
        teacher = trainer.target_model(clean).logits[0]
        for block in example.row.blocks:
            state = torch.tensor([[*example.row.clean[: block.start], *block.tokens]])
            student = trainer.model(state).logits[0, block.start :]
            places = slice(block.start, block.start + len(block.tokens))
            expected += DIVERGENCES[divergence](teacher[places], student).sum().item()
        assert loss_sums(trainer, [example])[0] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_label_smoothing_mixes_in_the_uniform_distribution(tmp_path):
    example = build_example(random_row(0), random.Random(0), StateSampling())
    plain, smoothed = (
        loss_sums(make_trainer(tmp_path, ar_loss="fixed_point", label_smoothing_factor=factor), [example]) for factor in (0.0, 0.1)
    )
    trainer = make_trainer(tmp_path)
    logits = trainer.model(torch.tensor([example.row.clean])).logits[0, example.ar_index]
    expected = 0.9 * plain[1] - 0.1 * logits.log_softmax(dim=-1).mean(dim=-1).sum().item()
    assert smoothed == pytest.approx([plain[0], expected], rel=1e-5)


def test_consistency_is_zero_at_the_fixed_point(tmp_path):
    trainer = make_trainer(tmp_path)
    row = random_row(0)
    fixed = TrajectoryRow(row.row_id, row.prompt_ids, row.response_ids, row.block_starts, [t[-1:] for t in row.trajectories])
    consistency, ar = loss_sums(trainer, [build_example(fixed, random.Random(0), StateSampling())])
    assert consistency == 0.0 and ar > 0.0


def test_the_detached_teacher_gets_no_gradient(tmp_path):
    """With ar_weight 0, only hidden states that student tokens read get a gradient."""
    trainer = make_trainer(tmp_path, teacher="self", ar_loss="fixed_point", ar_weight=0.0)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    hidden = torch.randn(*batch["input_ids"].shape, 32, requires_grad=True)
    trainer.packed_hidden = lambda model, batch, head: hidden
    consistency, _ = trainer.loss_sums(trainer.model, batch)
    consistency.backward()
    touched = hidden.grad[0].abs().sum(dim=-1).nonzero().flatten().tolist()
    assert set(touched) <= set(batch["student"][:, 1].tolist())
    assert touched


def test_with_its_adapter_disabled_a_model_is_its_own_target(tmp_path):
    """The losses equal those of the merged model with a second copy of the base as target."""
    pytest.importorskip("peft")
    adapted = add_adapter(tiny_model(vocab_size=97), LoraArguments(lora_r=4), seed=0)
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    alone = make_trainer(tmp_path, adapted)
    alone.target_model = None
    examples = [alone.train_dataset[i] for i in range(ROWS)]
    sums = loss_sums(alone, examples)
    beside = make_trainer(tmp_path, deepcopy(adapted).merge_and_unload())
    beside.target_model = tiny_model(vocab_size=97)
    assert sums == pytest.approx(loss_sums(beside, examples), rel=1e-4)
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    alone.train()
    changed = {name for name, weight in adapted.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_target_model_does_not_change(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    before = [p.clone() for p in trainer.target_model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.target_model.parameters()))


def test_training_lowers_the_loss_and_logs_its_terms(tmp_path):
    trainer = make_trainer(tmp_path, optim="adamw_torch", learning_rate=3e-3, max_steps=40, logging_steps=10)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "consistency_loss" in entry]
    assert len(logs) == 4
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["consistency_loss"] + trainer.args.ar_weight * entry["ar_loss"], rel=1e-3)


def test_logged_throughput_counts_steps_only(tmp_path, monkeypatch):
    """Two seconds a step; time between steps, as for evaluation and probes, does not count."""
    now = [0.0]
    monkeypatch.setattr("cllm.training.meter.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class SlowProbe(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            now[0] += 100

    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=2)
    trainer.add_callback(SlowProbe())
    forwarded, loss_sums = [], trainer.loss_sums

    def step(model, batch):
        now[0] += 2
        forwarded.append(batch)
        return loss_sums(model, batch)

    trainer.loss_sums = step
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, batches in zip(logs, [forwarded[:2], forwarded[2:]], strict=True):
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        useful = sum(int((batch["block"] >= 0).sum()) for batch in batches)
        assert entry["useful_tokens"] == pytest.approx(useful / tokens, abs=1e-4) and useful < tokens
        assert entry["tokens_per_second"] == pytest.approx(tokens / 4, abs=0.1)


def test_invalid_set_ups_are_refused_before_training(tmp_path):
    with pytest.raises(UsageError, match="no backward pass on a CPU"):
        make_trainer(tmp_path, tiny_model(vocab_size=97, attn_implementation="flex_attention"))
    with pytest.raises(UsageError, match="liger-kernel"):
        make_trainer(tmp_path, use_liger_kernel=True)
    with pytest.raises(UsageError, match="dataloader_persistent_workers"):
        make_trainer(tmp_path, dataloader_persistent_workers=True, dataloader_num_workers=1)
    with pytest.raises(UsageError, match="max_row_tokens must be >= 0, got -1"):
        make_trainer(tmp_path, max_row_tokens=-1)


NEW = {"state_choice": "noise", "random_block_size": True, "divergence": "hard"}


@pytest.mark.parametrize(("strategy", "objective"), [("random", {}), ("group_by_length", {}), ("random", NEW)], ids=str)
def test_resumed_training_equals_uninterrupted(tmp_path, strategy, objective):
    """From the first epoch and from the middle of the second."""
    options = dict(optim="adamw_torch", learning_rate=1e-3, max_steps=7, save_strategy="steps", save_steps=1)
    options |= dict(per_device_train_batch_size=2, train_sampling_strategy=strategy, **objective)
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    for step in (3, 5):
        resumed = make_trainer(tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
            assert torch.equal(a, b)


def shard_without_gpu(trainer: TokenMeanTrainer) -> None:
    """Make accelerate shard by FSDP2 on CPUs: torch can, but accelerate considers FSDP only on GPUs."""
    PartialState().distributed_type = DistributedType.MULTI_GPU
    Trainer.create_accelerator_and_postprocess(trainer)


def prepare(kind: type[TokenMeanTrainer]) -> None:
    """Prepare a trainer class for a process that :func:`in_two_processes` started."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        kind.create_accelerator_and_postprocess = shard_without_gpu


if __name__ == "__main__":  # one of two processes of test_two_processes_give_the_gradient_of_one
    prepare(CllmTrainer)
    together = make_trainer(sys.argv[1], per_device_train_batch_size=2, gradient_accumulation_steps=2)
    together.train()
    assert together.args.world_size == 2
    together.save_model()
    leave_process_group()
