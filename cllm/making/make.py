"""A model and prompts in, the same model with a consistency adapter out: faster, with the same text, and never slower."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from cllm.adapter import ADAPTER, ADAPTER_WEIGHTS
from cllm.cli import collect, speedup, train, tune
from cllm.decoding import JacobiDecoder
from cllm.decoding.guess import STARTS
from cllm.errors import UsageError
from cllm.evaluation.environment import check_writable
from cllm.evaluation.method import Engine
from cllm.evaluation.method_name import AR, JACOBI
from cllm.evaluation.report import write_report
from cllm.evaluation.results import read_results
from cllm.evaluation.speed import measure
from cllm.files import StrPath, write_json, write_text
from cllm.making.plan import LEAST_HELD_OUT, LEAST_PROMPTS, TUNING_PROMPTS, Costs, Plan, StepClock, make_plan, peak_memory
from cllm.making.sources import Gathered, Source, gather, split_off
from cllm.making.stages import FILE, Stage, Stages
from cllm.models import (
    DATA,
    DEFAULT_GUESS,
    REASON,
    add_to_record,
    check_path,
    context_length,
    default_device,
    folder_record,
    load_model,
    load_tokenizer,
    store_choice,
    weights_stamp,
)
from cllm.prompts import PLAIN, PromptTemplate, choose_template
from cllm.serving.contents import contents
from cllm.serving.export import CARD, Skeleton, copy_file
from cllm.serving.model_card import read_reports
from cllm.tasks import OWN_PROMPTS, get_task
from cllm.tasks.base import Example
from cllm.tasks.source import load_examples
from cllm.trajectory.store import TrajectoryWriter, read_rows

WORK = "make"  # the folder in OUTPUT with all that lies on the way
FIGURES = "make.json"
REPORT = "report.html"  # where matplotlib is there to draw
LEAST = LEAST_PROMPTS + LEAST_HELD_OUT  # prompts
BLOCK = 8  # tokens of a block in training; windows of decoding may be wider
BATCH, COLLECTED = 4, 16  # examples in a training step, prompts that are answered together
SAMPLE, SAMPLE_STEPS = 8, 4  # prompts and training steps that a plan is made from
SAMPLE_TOKENS = 32  # of a response that AR decoding is timed on
WIDTHS, DRAFTS = (6, 8, 12), (7, 11, 15)  # that are tried
CHECKPOINTS = 0.1  # of the training steps between two
AMX = "amx_bf16"  # what /proc/cpuinfo calls matrix units for bfloat16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What :func:`make` is given."""

    target: str
    prompts: Sequence[StrPath]
    output: Path
    held_out: Sequence[StrPath] = ()
    minutes: float | None = None
    max_new_seq_len: int = 128
    guess: str = DEFAULT_GUESS
    prompt_template: str | None = None
    dtype: str | None = None
    device: str | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UsageError(f"minutes must be a number above 0, got {self.minutes}")
        if self.max_new_seq_len < BLOCK:
            raise UsageError(f"max_new_seq_len must be >= {BLOCK}, got {self.max_new_seq_len}")
        if self.guess not in STARTS:
            raise UsageError(f"guess must be one of {', '.join(STARTS)}, got {self.guess!r}")
        if not self.prompts:
            raise UsageError("no prompts; pass at least one file, task or TASK:FILE")


def make(
    target: str,
    prompts: StrPath | Sequence[StrPath],
    output: StrPath,
    *,
    held_out: StrPath | Sequence[StrPath] = (),
    minutes: float | None = None,
    max_new_seq_len: int = 128,
    guess: str = DEFAULT_GUESS,
    prompt_template: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a consistency adapter for ``target`` on its own responses, find the fastest window on this device, and measure.

    ``target``: checkpoint folder or hub name. ``prompts`` and ``held_out``: ``FILE`` (JSONL, ``.txt`` or a log, see
    :mod:`cllm.tasks.own_prompts`), ``TASK`` or ``TASK:FILE``, one or several; without ``held_out`` a fifth of the prompts is
    held out, 64 at most. ``minutes``: about how long it may take, for as many prompts and epochs as fit; by default it takes
    all prompts. ``max_new_seq_len``: tokens of a response at most. ``guess``: what windows start from in training.
    ``dry_run``: stop when the plan is made. The folder ``output`` is then loaded as any model:
    :func:`cllm.models.load_model`. A run that was interrupted goes on when it is called again with the same arguments.

    Returns the figures that ``output/make.json`` holds: the plan, seconds by stage, the window, tokens per forward and the
    speedup over AR decoding on the held-out prompts, with 95% intervals. A window that is not faster than AR beyond noise is
    replaced by width 1, which is AR decoding; ``reason`` then says why. Raises UsageError for what cannot be worked with.
    """
    options = Options(
        target,
        _listed(prompts),
        Path(output),
        _listed(held_out),
        minutes,
        max_new_seq_len,
        guess,
        prompt_template,
        dtype,
        device,
        attn_implementation,
    )
    return Making(options).run(dry_run)


def _listed(given: StrPath | Sequence[StrPath]) -> list[StrPath]:
    return [given] if isinstance(given, str | os.PathLike) else list(given)


class Making:
    """One run: its files, and its stages in order."""

    def __init__(self, options: Options) -> None:
        """Raises UsageError for sources that are not there, and for an output folder with other things in it."""
        check_path(options.target)
        self.options, self.work = options, options.output / WORK
        self.sources = [Source.parse(text) for text in options.prompts]
        self.held_out = [Source.parse(text) for text in options.held_out]
        self.device = options.device or default_device()
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.wait: Callable[[], None] = lambda: None  # until all processes are here
        self.started = time.perf_counter()
        self.learned_from, self.measured_on = self.work / "prompts.jsonl", self.work / "held_out.jsonl"
        self.facts, self.planned = self.work / "prompts.json", self.work / "plan.json"
        self.responses, self.adapter = self.work / "responses", self.work / "adapter"
        self.tuned, self.measured = self.work / "tune.json", self.work / "speedup.json"
        _check_output(options.output)

    def run(self, dry_run: bool) -> dict[str, Any]:
        stages = self.stages()
        if state := collect.process_group(self.processes):
            self.wait = state.wait_for_everyone
        Stages(self.work, stages[:2] if dry_run else stages, self.rank, self.wait).run()
        if dry_run:
            return {"plan": self.plan.as_dict()}
        return json.loads((self.options.output / FIGURES).read_text(encoding="utf-8"))

    def stages(self) -> list[Stage]:
        options = self.options
        asked = {
            "target": [options.target, weights_stamp(options.target)],
            "prompts": [source.stamp() for source in self.sources],
            "held_out": [source.stamp() for source in self.held_out],
            "prompt_template": options.prompt_template,
        }
        limits = {name: getattr(options, name) for name in ("minutes", "max_new_seq_len", "guess", "dtype")}
        limits |= {"device": self.device, "processes": self.processes}
        written = [self.learned_from, self.measured_on, self.facts]
        published = [options.output / name for name in (ADAPTER, ADAPTER_WEIGHTS, "config.json", CARD, FIGURES)]
        return [
            Stage("prompts", "reading the prompts", self._read_prompts, written, asked),
            Stage("plan", "timing a few responses and training steps", self._plan, [self.planned], limits, together=True),
            Stage("responses", "writing the model's responses", self._respond, [self.responses], together=True),
            Stage("adapter", "training the adapter", self._train, [self.adapter], together=True),
            Stage("tune", "finding the fastest window on this device", self._tune, [self.tuned]),
            Stage("measure", "measuring on the held-out prompts", self._measure, [self.measured]),
            Stage("publish", f"writing {options.output}", self._publish, published),
        ]

    @property
    def plan(self) -> Plan:
        return Plan(**json.loads(self.planned.read_text(encoding="utf-8")))

    # ------------------------------------------------------------- the stages

    def _read_prompts(self) -> None:
        """Write the prompts to learn from and those to measure on, each once, and in what form they are asked."""
        found, apart = gather(self.sources, "train"), gather(self.held_out, "test")
        found.leave_out(list(apart.examples), "held out as well")
        template = self._leave_out_unfit(found, apart)
        for reason, times in apart.passed_over.items():
            found.count(f"held out, but {reason}", times)
        held_out = apart.examples if self.held_out else split_off(found)
        reasons = "".join(f"; {count} {reason}" for reason, count in found.passed_over.items())
        if len(found.examples) < LEAST_PROMPTS or len(held_out) < LEAST_HELD_OUT:
            raise UsageError(
                f"at least {LEAST} prompts are needed, {LEAST_HELD_OUT} of them held out; "
                f"got {len(found.examples)} to learn from and {len(held_out)} held out{reasons}"
            )
        logger.info("%d prompts to learn from, %d held out%s", len(found.examples), len(held_out), reasons)
        for path, examples in ((self.learned_from, found.examples), (self.measured_on, held_out)):
            write_text(path, "".join(_row(example) for example in examples.values()))
        facts = {"prompts": len(found.examples), "held_out": len(held_out), "passed_over": found.passed_over}
        write_json(self.facts, facts | {"prompt_template": template, "data": [source.label for source in self.sources]})

    def _leave_out_unfit(self, *parts: Gathered) -> str:
        """Leave out what cannot be answered; returns the template that the others are asked in."""
        tokenizer = load_tokenizer(self.options.target)
        context = context_length(AutoConfig.from_pretrained(self.options.target))
        templates = {source.task.plain_template for source in self.sources}
        plain = templates.pop() if len(templates) == 1 else get_task(OWN_PROMPTS).plain_template
        template = choose_template(self.options.prompt_template, plain, tokenizer, {})
        for part in parts:
            if tokenizer.chat_template is None and self.options.prompt_template is None:
                _check_no_conversations(part, self.options.target)
            for name, example in list(part.examples.items()):
                if reason := _unfit(example, template, tokenizer, context):
                    part.leave_out([name], reason)
        return template.text

    def _plan(self) -> None:
        """Answer a few prompts, take a few training steps, decode one response alone; from what they took, the plan."""
        sample = self.work / "sample"
        if self.rank == 0:
            response = self._timed_responses(sample)
        self.wait()
        step = self._timed_step(sample)
        if self.rank > 0:
            return
        rows = list(read_rows(sample))
        tokens = sum(len(row.response_ids) for row in rows) / len(rows)
        costs = Costs(
            response=response / self.processes,
            example=step / (BATCH * self.processes),
            single=self._timed_token(rows[0].prompt_ids) * tokens,
            tokens=tokens,
            spent=time.perf_counter() - self.started,
            memory=peak_memory(),
        )
        shutil.rmtree(sample)
        facts = self._facts()
        made = make_plan(costs, facts["prompts"], facts["held_out"], self.options.minutes)
        logger.info("the plan:\n%s", made)
        write_json(self.planned, made.as_dict())

    def _respond(self) -> None:
        collect.run(self._collecting(self.responses, self.plan.prompts, resume=True))

    def _train(self) -> None:
        words = self._training(self.responses, self.adapter, num_train_epochs=self.plan.epochs)
        resuming = ["--save_steps", CHECKPOINTS, "--save_total_limit", 1, "--resume_from_checkpoint", True]
        train.run(words + _words(resuming), "cllm make")
        if self.rank == 0:
            add_to_record(self.adapter, {DATA: self._facts()["data"]})

    def _tune(self) -> None:
        words = ["--filename", self.learned_from, "--data_size", TUNING_PROMPTS, "--output", self.tuned, "--save"]
        words += ["--widths", *WIDTHS, "--drafts", *DRAFTS, "--guess", self.options.guess]
        tune.run(tune.options(argv := self._decoding("--model", words)).parse_args(argv))

    def _measure(self) -> None:
        best = json.loads(self.tuned.read_text(encoding="utf-8"))["best"]["1"]
        words = ["--filename", self.measured_on, "--data_size", self.plan.held_out, "--output", self.measured]
        words += ["--max_new_tokens", best["width"], "--drafts", best["drafts"], "--guess", best["guess"]]
        args = speedup.options(None, argv := self._decoding("--test_model", words)).parse_args(argv)
        write_json(self.measured, speedup.run(args))

    def _publish(self) -> None:
        """Store the window, or width 1 where that is not faster; copy the adapter to where it is used, and sum up."""
        output = self.options.output
        reports = read_reports([self.measured], folder_record(self.adapter))
        settings, reason = reports[0]["settings"], too_slow(reports[0]["methods"][JACOBI])
        if reason:
            logger.warning("%s; width 1, which is AR decoding, is stored", reason)
        width, drafts = (1, 0) if reason else (settings["block_size"], settings["drafts"])
        store_choice(str(self.adapter), width, settings["guess"][0], drafts)
        add_to_record(self.adapter, {REASON: reason})
        skeleton = Skeleton(self.adapter)
        write_text(output / CARD, skeleton.card(output, reports, alone=True))
        for name, path in contents(self.adapter, str(self.adapter), adapter_only=True).items():
            copy_file(path, output / name)
        if find_spec("matplotlib"):
            write_report(read_results(self.work), output / REPORT, f"What was measured of {output.resolve().name}")
        for folder in self.adapter.glob("checkpoint-*"):
            shutil.rmtree(folder)
        write_json(output / FIGURES, self._figures(reports[0], reason))

    # -------------------------------------------------------------- internals

    def _facts(self) -> dict[str, Any]:
        return json.loads(self.facts.read_text(encoding="utf-8"))

    def _timed_responses(self, folder: Path) -> float:
        """Seconds of one of a few responses in a batch; they are stored in the folder."""
        args, task = self._collecting(folder, SAMPLE, resume=False), get_task(OWN_PROMPTS)
        examples = list(load_examples(task, self.learned_from, "train", SAMPLE))
        collector, settings = collect.make_collector(args, task)
        with TrajectoryWriter(folder, settings.as_dict(), resume=False) as writer:
            start = time.perf_counter()
            for _ in collector.run(examples, writer, batch_size=COLLECTED):
                pass
            return (time.perf_counter() - start) / len(examples)

    def _timed_step(self, folder: Path) -> float:
        """Seconds of a training step of all processes together, on the responses in the folder."""
        words = self._training(folder, folder / "adapter", max_steps=SAMPLE_STEPS, save_strategy="no")
        trainer, clock = train.build_trainer(*train.arguments(words, "cllm make")), StepClock()
        trainer.add_callback(clock)
        trainer.train()
        return clock.seconds

    def _timed_token(self, prompt: list[int]) -> float:
        """Seconds of a token by AR decoding of a prompt alone, its prefill included."""
        model = load_model(
            self.options.target,
            dtype=self.options.dtype,
            device=self.device,
            attn_implementation=self.options.attn_implementation,
        )
        length, context = min(SAMPLE_TOKENS, self.options.max_new_seq_len), context_length(model.config)
        (run,) = measure([Engine(JacobiDecoder(model, 1), AR, AR)], [[prompt]], length, context=context).runs[AR]
        return run.seconds / len(run.responses[0].token_ids)

    def _collecting(self, folder: Path, count: int, resume: bool) -> Any:
        words = ["--model", self.options.target, "--filename", self.learned_from, "--output", folder, "--responses_only"]
        words += ["--data_size", count, "--max_new_tokens", BLOCK, "--max_new_seq_len", self.options.max_new_seq_len]
        words += ["--batch_size", COLLECTED, "--guess", self.options.guess, "--resume" if resume else "--no-resume"]
        words += ["--prompt_template", self._facts()["prompt_template"], *self._how(self._frozen)]
        return collect.build_parser(OWN_PROMPTS).parse_args(_words(words))

    def _training(self, responses: Path, folder: Path, **more: Any) -> list[str]:
        words = ["--lossless", "--model", self.options.target, "--trajectories", responses, "--output_dir", folder]
        words += ["--block_size", BLOCK, "--per_device_train_batch_size", BATCH, "--logging_steps", 8, "--report_to", "none"]
        words += self._how(self._frozen, training=True)
        words += ["--bf16"] if self._quick_bfloat16 else []
        words += ["--use_cpu"] if self.device == "cpu" else []
        return _words(words + [word for name, value in more.items() for word in (f"--{name}", value)])

    def _decoding(self, option: str, words: Sequence[Any]) -> list[str]:
        """Words of ``tune`` and ``speedup``."""
        more = ["--max_new_seq_len", self.options.max_new_seq_len, *self._how(self.options.dtype)]
        return _words(["--task", OWN_PROMPTS, option, self.adapter, *words, *more])

    def _how(self, dtype: str | None, training: bool = False) -> list[str]:
        """The model is loaded."""
        given = {"dtype": dtype, "attn_implementation": self.options.attn_implementation}
        given |= {} if training else {"device": self.options.device}
        return [word for name, value in given.items() if value for word in (f"--{name}", value)]

    @property
    def _quick_bfloat16(self) -> bool:
        """Whether this device multiplies matrices of bfloat16 several times faster."""
        if self.device != "cpu":
            return True
        file = Path("/proc/cpuinfo")
        return file.is_file() and AMX in file.read_text(encoding="utf-8")

    @property
    def _frozen(self) -> str | None:
        """The precision of the target model's weights where it writes responses and is trained for."""
        return self.options.dtype or ("bfloat16" if self._quick_bfloat16 else None)

    def _figures(self, report: dict[str, Any], reason: str | None) -> dict[str, Any]:
        found, settings = report["methods"][JACOBI], report["settings"]
        names = ("tokens_per_forward", "tokens_per_second", "speedup", "same_as_ar")
        intervals = ("tokens_per_forward_interval", "speedup_interval")
        return {
            "plan": self.plan.as_dict(),
            "seconds": Stages(self.work, []).seconds(),
            "width": settings["block_size"],
            "drafts": settings["drafts"],
            "guess": settings["guess"][0],
            "stored_width": 1 if reason else settings["block_size"],
            "reason": reason,
            **{name: found[name] for name in (*names, *intervals)},
            "ar_tokens_per_second": report["methods"][AR]["tokens_per_second"],
            "divergences": report["divergences"],
        }


def too_slow(figures: dict[str, Any]) -> str | None:
    """Why a window with these figures of ``cllm speedup`` is not to be used; None where it is faster than AR beyond noise."""
    interval = figures["speedup_interval"]
    if interval is not None and interval[0] > 1:
        return None
    between = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    gained, speed = figures["tokens_per_forward"], figures["speedup"]
    return (
        f"not faster than AR beyond noise: speedup {speed:.2f}{between}, since {gained:.2f} tokens per forward "
        f"come at {gained / speed:.2f} times AR's time per forward"
    )


def _words(values: Sequence[Any]) -> list[str]:
    return [str(value) for value in values]


def _row(example: Example) -> str:
    return json.dumps({"messages": example.messages}, ensure_ascii=False) + "\n"


def _unfit(example: Example, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, context: int | None) -> str | None:
    """Why a prompt cannot be answered."""
    try:
        ids = template.encode(example.messages, tokenizer)
    except UsageError:
        return "refused by the chat template"
    return "too long for the model's context" if context is not None and len(ids) > context - BLOCK else None


def _check_no_conversations(gathered: Gathered, target: str) -> None:
    conversations = sum(len(e.messages) > 1 or e.tags.get("form") == "conversation" for e in gathered.examples.values())
    if conversations:
        raise UsageError(
            f"{conversations} prompts are conversations (messages), and the tokenizer of {target} has no chat template to "
            f"write them in; pass prompt_template: {PLAIN}, the name of one, or a text with {{question}}"
        )


def _check_output(folder: Path) -> None:
    """Raise UsageError for a folder that cannot be written to, or that holds something else than an earlier run."""
    other = folder.is_dir() and any(path.name != WORK for path in folder.iterdir()) and not (folder / WORK / FILE).is_file()
    if other or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"OUTPUT must be new, empty, or that of an earlier `cllm make`, got {folder}, which is not")
    check_writable(folder / WORK / "prompts.json")
