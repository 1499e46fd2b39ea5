"""Shared by the benchmarks: options, model and prompts, timing against a bare forward, memory, the result file."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from cllm.attention import cache_argument
from cllm.decoding import JacobiDecoder
from cllm.evaluation.environment import environment
from cllm.evaluation.speed import now
from cllm.files import write_json
from cllm.models import DTYPES, load_model, load_tokenizer, read_record
from cllm.prompts import choose_template
from cllm.tasks import get_task
from cllm.tasks.source import load_examples
from cllm.training.arguments import CllmTrainingArguments
from cllm.training.examples import Collator, ExampleDataset
from cllm.training.trainer import CllmTrainer
from cllm.trajectory.collect import CollectionSettings, Collector, Prompt
from cllm.trajectory.record import Dropped, TrajectoryRow

PATHS = ("output", "filename", "model", "data", "trajectories", "side")  # options left out of the result file
COPYING = "copying"  # a --task: generated prompts whose answers repeat them
QUESTIONS = 4  # questions in a text to copy


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a benchmark's docstring as its help."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def model_parser(doc: str | None, prompts: int) -> argparse.ArgumentParser:
    """A parser with the options that :func:`load` reads; ``prompts`` is their default number."""
    options = parser(doc)
    options.add_argument("--model", required=True)
    options.add_argument("--dtype", choices=DTYPES, default="float32")
    options.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    options.add_argument("--task", default="gsm8k", help=f"the source of the prompts; {COPYING}: generated, needs no file")
    options.add_argument("--filename", help="the task's data; default: the hub dataset")
    options.add_argument("--prompts", type=int, default=prompts)
    options.add_argument("--block_size", type=int, default=16)
    options.add_argument("--length", type=int, default=128, help="new tokens per response")
    add_output(options)
    return options


def add_output(options: argparse.ArgumentParser) -> None:
    """The option that :func:`publish` reads."""
    options.add_argument("--output", help="where to write the result as JSON")


def load(args: argparse.Namespace):
    """Model, tokenizer, and the token ids of the first prompts."""
    model, tokenizer = load_both(args)
    return model, tokenizer, encode(model, tokenizer, args.task, args.filename, args.prompts)


def load_both(args: argparse.Namespace):
    """Model and tokenizer."""
    return load_model(args.model, dtype=args.dtype, device=args.device), load_tokenizer(args.model)


def encode(model: PreTrainedModel, tokenizer, task_name: str, filename: str | None, count: int) -> list[list[int]]:
    """The token ids of a task's first prompts, or of :func:`copying`, in the model's prompt template."""
    if task_name == COPYING:
        return encode_messages(model, tokenizer, "gsm8k", [[{"role": "user", "content": text}] for text in copying(count)])
    examples = load_examples(get_task(task_name), filename, "train" if task_name == "gsm8k" else "test", count)
    return encode_messages(model, tokenizer, task_name, [example.messages for example in islice(examples, count)])


def encode_messages(model: PreTrainedModel, tokenizer, task_name: str, conversations: Iterable[Sequence[Any]]) -> list[list[int]]:
    """The token ids of a task's conversations in the model's prompt template."""
    template = choose_template(None, get_task(task_name).plain_template, tokenizer, read_record(model.config))
    return [template.encode(list(messages), tokenizer) for messages in conversations]


def copying(count: int) -> list[str]:
    """Requests to repeat a text with one word replaced, so that answers mostly copy their prompts."""
    sys.path.append(str(Path(__file__).parents[1]))
    from sql_questions import questions

    changes = [("and", "plus"), ("the", "those"), ("who", "that"), ("of", "among")]
    rows = questions(QUESTIONS * count)
    texts = [" ".join(row["question"] for row in rows[at : at + QUESTIONS]) for at in range(0, len(rows), QUESTIONS)]
    wanted = [changes[at % len(changes)] for at in range(count)]
    return [
        f'Repeat this text word for word, but write "{new}" instead of "{old}".\n\n{text}'
        for text, (old, new) in zip(texts, wanted, strict=True)
    ]


def add_shapes(options: argparse.ArgumentParser, widths: list[int], batches: list[int]) -> None:
    options.add_argument("--widths", type=int, nargs="+", default=widths)
    options.add_argument("--batches", type=int, nargs="+", default=batches)


def each_shape(args: argparse.Namespace, figures: Callable[[int, int], dict[str, float]]) -> dict[str, dict[str, float]]:
    """``figures(batch, width)`` for every batch size and width, each printed as soon as it is known."""
    result = {}
    for batch, width in product(args.batches, args.widths):
        name = f"batch {batch}, width {width}"
        result[name] = figures(batch, width)
        print(f"{name}: {result[name]}", flush=True)
    return result


def joined(prompts: list[list[int]], length: int, batch: int, rounds: int) -> list[list[list[int]]]:
    """``rounds`` batches of texts of ``length`` tokens, each the end of several concatenated prompts; length 0: one prompt each."""
    texts = []
    for at in range(batch * rounds):
        text = prompts[at % len(prompts)]
        while len(text) < length:
            at -= 1
            text = prompts[at % len(prompts)] + text
        texts.append(text[-length:])
    return [texts[at : at + batch] for at in range(0, len(texts), batch)]


def switched(
    model: PreTrainedModel,
    width: int,
    batches: list[list[list[int]]],
    count: int,
    switch: Callable[[bool], AbstractContextManager],
) -> dict[str, float]:
    """Milliseconds per iteration with a feature of the decoder on and off: medians over ``count`` iterations of each batch.

    The two sides alternate batch by batch. Each has a decoder of its own, since captured steps would not notice the switch.
    """
    decoders = {on: JacobiDecoder(model, width) for on in (True, False)}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for prompts, on in product(batches, decoders):
        with switch(on):
            seconds[on] += iterations(decoders[on], prompts, count)
    with_it, without = statistics.median(seconds[True]), statistics.median(seconds[False])
    return {"milliseconds, on": 1000 * with_it, "milliseconds, off": 1000 * without, "times faster": without / with_it}


def iterations(decoder: JacobiDecoder, prompts: list[list[int]], count: int) -> list[float]:
    """Seconds of each iteration after the prefill."""
    running, seconds = decoder.iterate(prompts, max_new_tokens=(count + 1) * decoder.width), []
    next(running)
    for _ in range(count):
        start = now(decoder.device)
        if next(running, None) is None:
            break
        seconds.append(now(decoder.device) - start)
    return seconds


@torch.inference_mode()
def race(decoder: JacobiDecoder, prompt: list[int], batch: int, iterations: int) -> list[tuple[float, ...]]:
    """Seconds per iteration of (engine, bare forward of the same tokens); with an adapter, also of the bare forward without it.

    The sides alternate iteration by iteration. The bare forward is ``model(...)`` over transformers' DynamicCache, cropped
    afterwards (not timed), with the decoder's linear layers and attention. The prefill and the next two iterations are
    left out.
    """
    model, step, times = decoder.model, decoder.step, []
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prompt[:-1]] * batch, device=model.device), **{cache_argument(model): cache}, logits_to_keep=1)
    running = decoder.iterate([prompt] * batch, max_new_tokens=(iterations + 3) * decoder.width)

    def bare(inputs: dict[str, torch.Tensor], drafts: int) -> float:
        start = now(model.device)
        with step.linears.drafting(step.adapter, inputs["input_ids"].shape[1], drafts), step.attention:
            model(**inputs, **{cache_argument(model): cache})
        return now(model.device) - start

    for _ in range(iterations + 3):
        start = now(model.device)
        iteration = next(running, None)
        engine = now(model.device) - start
        if iteration is None:
            break
        inputs = bare_inputs(iteration.window_BW, step.drafts, cache.get_seq_length(), model.dtype)
        tokens = inputs["input_ids"].shape[1]
        seconds = [bare(inputs, step.drafts)]
        if step.drafts:
            cache.crop(-tokens)
            seconds.append(bare(inputs, 0))
        times.append((engine, *seconds))
        if wrong := tokens - int(iteration.emitted_B[0]):
            cache.crop(-wrong)
    return times[3:]


def bare_inputs(window_BW: torch.Tensor, drafts: int, past: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's inputs for a window, followed by its guesses as draft tokens, over a cache of ``past`` tokens."""
    if not drafts:
        return {"input_ids": window_BW}
    B, W = window_BW.shape
    order = torch.cat([torch.arange(W), torch.arange(1, 1 + drafts)]).to(window_BW.device)
    side = torch.arange(W + drafts, device=window_BW.device) >= W
    sees = (order[None, :] <= order[:, None]) & (side[None, :] == side[:, None])
    sees[:, 0] = True
    sees = torch.cat([sees.new_ones(W + drafts, past), sees], dim=1)
    mask = torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    return {
        "input_ids": window_BW[:, order.clamp(max=W - 1)],
        "position_ids": (past + order).expand(B, -1),
        "attention_mask": mask.expand(B, 1, -1, -1),
    }


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds the peak in bytes on exit: of CUDA's allocator or of the process; empty where unknown."""
    peak: list[int] = []
    clear = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
    elif clear.exists():
        clear.write_text("5")
        yield peak
        peak.append(process_memory("VmHWM"))
    else:
        yield peak


def process_memory(entry: str) -> int:
    """Bytes of memory of this process by an entry of /proc/self/status: VmRSS now, VmHWM at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) << 10


def aligned_collector(args: argparse.Namespace, model: PreTrainedModel, tokenizer) -> Collector:
    """A collector whose blocks start where those of the paper's procedure do."""
    return Collector(model, tokenizer, CollectionSettings(args.model, "gsm8k", "chat", args.block_size, args.length, aligned=True))


def collect(collector: Collector, prompts: list[list[int]]) -> tuple[list[TrajectoryRow], list[Dropped]]:
    """The rows of some prompts, decoded together; a row's id is the prompt's number."""
    numbered = [Prompt(str(number), ids, None) for number, ids in enumerate(prompts)]
    answers = collector.source.respond(numbered, len(numbered))
    return collector.rows([answer for answer in answers if not isinstance(answer, Dropped)])


def cllm_trainer(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer, rows: list[TrajectoryRow], folder: str, **options: Any
) -> CllmTrainer:
    """A trainer of ``model`` on some rows, with a frozen target where the options need one."""
    training = CllmTrainingArguments(output_dir=folder, use_cpu=model.device.type == "cpu", report_to="none", **options)
    target = load_model(args.model, dtype=args.dtype, device=args.device) if training.needs_target else None
    collator = Collator(tokenizer.pad_token_id, training.distance_decay, training.max_row_tokens)
    dataset = ExampleDataset(rows, training.state_sampling)
    return CllmTrainer(model=model, args=training, train_dataset=dataset, data_collator=collator, target_model=target)


class Forwarded:
    """Counts the forwards of a model and their tokens, padding included."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.tokens, self.calls = model, 0, 0

    def __enter__(self) -> Forwarded:
        self.hook = self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()

    def _count(self, module, args, kwargs) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.tokens, self.calls = self.tokens + ids.numel(), self.calls + 1


def publish(args: argparse.Namespace, model: PreTrainedModel, result: dict[str, Any]) -> None:
    """Print the result and write it with settings, versions and device."""
    for name, value in result.items():
        if isinstance(value, (dict, list)):
            continue
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name not in PATHS}
        content = {
            "benchmark": Path(sys.argv[0]).stem,
            "settings": settings,
            "model": {"name": Path(getattr(args, "model", None) or "").name, "parameters": model.num_parameters()},
            "result": result,
            "environment": environment(model.device),
        }
        write_json(args.output, content)
