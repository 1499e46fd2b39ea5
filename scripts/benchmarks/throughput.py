"""Training throughput against the paper's step, and training memory against ordinary fine-tuning, in one run.

Responses of --length tokens are concatenated answers of the dataset. Only time and memory are measured, so trajectories are
synthetic: state k of a block has its first k tokens right and random tokens of the context after them, as with a model that
gains one token per iteration. Both sides train on one state of every block of a response (ours also on two), forward and
backward, without the optimizer.

The paper's step (cllm/reference.py) processes one block with three forwards and two backwards. A round times one such step, on
the middle block of the round's share of the response, alternating with our passes over the whole response. The paper's time
per response is the mean over rounds times the number of blocks, since a block's cost grows about linearly with the text before
it.

Memory is the peak of two AdamW steps at batch size 1, minus the process's memory before the model is loaded, each side in a
process of its own. Fine-tuning is that of ``cllm sft``.

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
from typing import Any

from common import cllm_trainer, load, model_parser, peak_memory, process_memory, publish
from transformers import Trainer, TrainingArguments

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
ANSWER = 20  # about the shortest answer in tokens, which bounds how many to read


def main() -> None:
    options = model_parser(__doc__, prompts=4)
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
    """A row for each prompt: its answer and the following ones, truncated to the length, with synthetic states."""
    examples = load_examples(get_task(args.task), args.filename, "train", len(prompts) + args.length // ANSWER)
    answers = [tokenizer(example.reference, add_special_tokens=False).input_ids for example in examples if example.reference]
    draw, rows = random.Random(0), []
    for index, prompt in enumerate(prompts):
        response = list(islice(chain.from_iterable(answers[index:]), args.length))
        if len(response) < args.length:
            raise SystemExit(f"the answers from number {index} on have {len(response)} tokens, but --length is {args.length}")
        starts = block_starts(len(response), args.block_size)
        states = []
        for start in starts:
            fixed = response[start : start + args.block_size]
            states.append([fixed[:right] + draw.choices(prompt, k=len(fixed) - right) for right in range(len(fixed))] + [fixed])
        rows.append(TrajectoryRow(str(index), prompt, response, starts, states))
    return rows


def race(args: argparse.Namespace, model, tokenizer, rows: list[TrajectoryRow]) -> dict[str, list[float]]:
    """Seconds of each side in each round; sides alternate, and each round takes the next response. A warm-up round is left out."""
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
    """One pass over all blocks of one response, packing included."""
    batch = trainer.data_collator([trainer.train_dataset[number % responses]])
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()


def papers_step(model, rows: list[TrajectoryRow], rounds: int, number: int) -> None:
    """One step of the paper's, on the middle block of the round's share of a response."""
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
    """Peak bytes of two optimizer steps on one response: weights, gradients, AdamW's moments, activations."""
    before = process_memory("VmRSS")
    model, tokenizer, _ = load(args)
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Any] = dict(per_device_train_batch_size=1, max_steps=2, save_strategy="no", disable_tqdm=True)
        trainer: Trainer
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


if __name__ == "__main__":
    main()
