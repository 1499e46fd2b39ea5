"""Training throughput against the paper's step, and training memory against ordinary fine-tuning, in one run.

Responses of --length tokens are answers of the data set, one behind the other. Only time and memory are measured, so their
trajectories are made up: state k of a block has its first k tokens right and others of the context behind them, as with a model
that gains one token per iteration. For each response one state of every block is trained on both sides (two are timed as
well), forward and backward, without the optimizer.

The paper's step (cllm/reference.py) takes one block: three forwards and two backwards. A round times one such step, at a block
in the middle of the round's share of the response, in turn with our passes over the whole response. The mean over rounds times
the number of blocks is the paper's time per response: a block's cost grows about linearly with what stands before it.

Memory is the peak of two AdamW steps at batch 1, each side in a process of its own, above what the process holds before the
model is loaded; fine-tuning is that of ``cllm sft``.

    python scripts/benchmarks/throughput.py --model MODEL --filename gsm8k_train.jsonl --output throughput.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from common import add_options, cllm_trainer, load, peak_memory, publish
from transformers import TrainingArguments

from cllm import reference
from cllm.evaluation.speed import now
from cllm.tasks import get_task
from cllm.tasks.source import load_examples
from cllm.training.sft import AnswerCollator, Answered, AnswerTrainer
from cllm.trajectory.record import TrajectoryRow
from cllm.trajectory.states import block_starts

PAPER = "the paper's objective"
OBJECTIVES: dict[str, dict[str, Any]] = {
    PAPER: dict(teacher="self", ar_loss="fixed_point", distance_decay=1.0, states_per_block=1),
    "default objective": {},
    "default objective, two states per block": dict(states_per_block=2),
}
FINE_TUNING = "fine-tuning"
ANSWER = 20  # tokens that an answer has at least, about: how many to read


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(options, prompts=4)
    options.set_defaults(length=512)
    options.add_argument("--rounds", type=int, default=4)
    args = options.parse_args()
    model, tokenizer, prompts = load(args)
    rows = responses(args, tokenizer, prompts)
    seconds = race(args, model, tokenizer, rows)
    blocks = len(rows[0].block_starts)
    paper = blocks * statistics.mean(seconds.pop("the paper's step"))
    result: dict[str, Any] = {"responses": len(rows), "blocks": blocks, "seconds per response, the paper's steps": paper}
    for name, times in seconds.items():
        result[f"seconds per response, {name}"] = statistics.mean(times)
        result[f"times faster, {name}"] = paper / statistics.mean(times)
    peaks = {name: peak_alone(args, rows[0], name) for name in (FINE_TUNING, *OBJECTIVES)}
    for name, peak in peaks.items():
        result[f"MiB, {name}"] = peak / 2**20
        result[f"memory over fine-tuning, {name}"] = peak / peaks[FINE_TUNING]
    publish(args, model, result)


def responses(args: argparse.Namespace, tokenizer, prompts: list[list[int]]) -> list[TrajectoryRow]:
    """A row for each prompt: the answers from its own on, cut to the length, with made-up states."""
    examples = load_examples(get_task(args.task), args.filename, "train", len(prompts) + args.length // ANSWER)
    answers = [tokenizer(example.reference, add_special_tokens=False).input_ids for example in examples if example.reference]
    draw, rows = random.Random(0), []
    for index, prompt in enumerate(prompts):
        response = list(islice(chain.from_iterable(answers[index:]), args.length))
        if len(response) < args.length:
            raise SystemExit(f"the answers from number {index} on have {len(response)} tokens, --length wants {args.length}")
        starts = block_starts(len(response), args.block_size)
        states = []
        for start in starts:
            fixed = response[start : start + args.block_size]
            states.append([fixed[:right] + draw.choices(prompt, k=len(fixed) - right) for right in range(len(fixed))] + [fixed])
        rows.append(TrajectoryRow(str(index), prompt, response, starts, states))
    return rows


def race(args: argparse.Namespace, model, tokenizer, rows: list[TrajectoryRow]) -> dict[str, list[float]]:
    """Seconds of each side, round by round in turn; a round's response is the next one. The first of each warms up."""
    model.train()
    passes: dict[str, Callable[[int], None]] = {"the paper's step": partial(papers_step, model, rows, args.rounds)}
    with tempfile.TemporaryDirectory() as folder:
        for name, objective in OBJECTIVES.items():
            trainer = cllm_trainer(args, model, tokenizer, rows, folder, **objective)
            passes[f"ours, {name}"] = partial(our_pass, trainer, len(rows))
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for number in range(-1, args.rounds):
            for name, run in passes.items():
                start = now(model.device)
                run(max(number, 0))
                if number >= 0:
                    seconds[name].append(now(model.device) - start)
                model.zero_grad()
            print(f"round {number + 1} of {args.rounds}", flush=True)
    return seconds


def our_pass(trainer, responses: int, number: int) -> None:
    """All blocks of one response, packing included."""
    batch = trainer.data_collator([trainer.train_dataset[number % responses]])
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()


def papers_step(model, rows: list[TrajectoryRow], rounds: int, number: int) -> None:
    """One block of one response, the middle one of the round's share."""
    row = rows[number % len(rows)]
    block = (2 * number + 1) * len(row.block_starts) // (2 * rounds)
    states, prefix = row.trajectories[block], row.prompt_ids + row.response_ids[: row.block_starts[block]]
    one = reference.ReferenceBlock(prefix, states)
    consistency, ar, _ = reference.training_losses(model, row.prompt_ids, row.response_ids, one, len(states) // 2)
    ar.backward()
    consistency.backward()


def peak_alone(args: argparse.Namespace, row: TrajectoryRow, name: str) -> int:
    """:func:`peak` in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (args, row, name))


def peak(args: argparse.Namespace, row: TrajectoryRow, name: str) -> int:
    """Bytes that two optimizer steps over one response hold at most: weights, gradients, AdamW's moments, activations."""
    before = resident()
    model, tokenizer, _ = load(args)
    with tempfile.TemporaryDirectory() as folder:
        steps = dict(per_device_train_batch_size=1, max_steps=2, save_strategy="no", disable_tqdm=True)
        if name == FINE_TUNING:
            use_cpu = model.device.type == "cpu"
            training = TrainingArguments(output_dir=folder, use_cpu=use_cpu, report_to="none", remove_unused_columns=False, **steps)
            collator, data = AnswerCollator(tokenizer.pad_token_id), [Answered(row.prompt_ids, row.response_ids)] * 2
            trainer = AnswerTrainer(model=model, args=training, train_dataset=data, data_collator=collator)
        else:
            trainer = cllm_trainer(args, model, tokenizer, [row] * 2, folder, **steps, **OBJECTIVES[name])
        with peak_memory(model.device) as found:
            trainer.train()
    return found[0] - (before if model.device.type == "cpu" else 0)


def resident() -> int:
    """Bytes of memory that this process holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    main()
