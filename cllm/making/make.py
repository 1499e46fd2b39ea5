"""A model and prompts in, the same model with a consistency adapter out: faster, with the same text, and never slower."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cllm.adapter import ADAPTER, ADAPTER_WEIGHTS
from cllm.decoding import JacobiDecoder
from cllm.decoding.queue import free_memory
from cllm.errors import UsageError, out_of_memory
from cllm.evaluation.arguments import SpeedArguments, TuneArguments
from cllm.evaluation.environment import check_writable
from cllm.evaluation.method import Engine
from cllm.evaluation.method_name import AR, JACOBI
from cllm.evaluation.report import write_report
from cllm.evaluation.results import read_results
from cllm.evaluation.speed import measure
from cllm.evaluation.speed_run import measure_speed
from cllm.evaluation.tune import tune
from cllm.files import StrPath, write_json, write_text
from cllm.making.arguments import MakeArguments
from cllm.making.plan import LEAST_HELD_OUT, MARGIN, TUNING_PROMPTS, TUNING_TOKENS, Costs, Plan, StepClock, make_plan, peak_memory
from cllm.making.sources import Gathered, Source, gather, split_off
from cllm.making.stages import FILE, Stage, Stages
from cllm.models import (
    DATA,
    REASON,
    add_to_record,
    check_path,
    context_length,
    default_device,
    folder_record,
    load_config,
    load_model,
    load_tokenizer,
    store_choice,
    weights_stamp,
)
from cllm.options import LOSSLESS_BLOCK, Dtype
from cllm.processor import has_bfloat16_products
from cllm.prompts import PLAIN, PromptTemplate, choose_template
from cllm.serving.contents import contents
from cllm.serving.export import CARD, Skeleton, copy_file
from cllm.serving.model_card import read_reports
from cllm.tasks import OWN_PROMPTS, get_task
from cllm.tasks.base import Example
from cllm.tasks.source import load_examples
from cllm.training.arguments import LosslessTrainingArguments
from cllm.training.build import TrainingInputs, build_trainer, train
from cllm.trajectory.arguments import CollectArguments, SourceOptions
from cllm.trajectory.collect import OwnEngine
from cllm.trajectory.collection import collect, make_collector, process_group
from cllm.trajectory.departures import Departure, describe
from cllm.trajectory.store import TrajectoryWriter, read_rows

WORK = "make"  # the folder in OUTPUT with all intermediate files
FIGURES = "make.json"
REPORT = "report.html"  # where matplotlib is installed
LEAST_PROMPTS = 8  # to learn from
LEAST = LEAST_PROMPTS + LEAST_HELD_OUT  # prompts in all
EPOCH_STEPS = 20  # an epoch has fewer only if its steps have the fewest examples
SAMPLE_STEPS = 6  # training steps that are timed for the plan
SAMPLE_TOKENS = 32  # of a response that AR decoding is timed on
CHECKPOINTS = 0.1  # share of the training steps between two

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What suits a kind of device."""

    batch: int  # examples in a training step
    least: int  # of them, where there are few prompts
    collected: int  # prompts that are answered together; the first batch of them is timed for the plan
    widths: tuple[int, ...]  # candidates


CPU = Sizes(batch=2, least=2, collected=64, widths=(2, 3, 4, 6, 8))
GPU = Sizes(batch=32, least=4, collected=128, widths=(8, 12, 16))


def make(model: str, prompts: StrPath | Sequence[StrPath], output: StrPath, **options: Any) -> dict[str, Any]:
    """Train a consistency adapter for a model on its own responses, find the fastest window on this device, and measure.

    ``model``: checkpoint folder or hub name. ``prompts``: ``FILE`` (JSONL, ``.txt`` or a log, see
    :mod:`cllm.tasks.own_prompts`), ``TASK`` or ``TASK:FILE``, one or several. ``options``: the other fields of
    :class:`cllm.making.arguments.MakeArguments`, such as ``minutes=15`` or ``held_out="test.jsonl"``. The folder ``output`` then
    loads like any model (:func:`cllm.models.load_model`). To resume an interrupted run, call it again with the same arguments.

    Returns the figures that ``output/make.json`` holds: the plan, seconds by stage, the window, tokens per forward and the
    speedup over AR decoding on the held-out prompts, with 95% intervals. A window that is not faster than AR beyond noise is
    replaced by width 1, which is AR decoding; ``reason`` then says why. Raises UsageError for unusable input.
    """
    if "held_out" in options:
        options["held_out"] = _listed(options["held_out"])
    return Making(MakeArguments(model=model, prompts=_listed(prompts), output=Path(output), **options)).run()


def _listed(given: StrPath | Sequence[StrPath]) -> list[StrPath]:
    return [given] if isinstance(given, str | os.PathLike) else list(given)


class Making:
    """One run: its files, and its stages in order."""

    def __init__(self, options: MakeArguments) -> None:
        """Raises UsageError for missing sources, and for an output folder that holds something else."""
        check_path(options.model)
        self.options, self.work = options, options.output / WORK
        self.sources = [Source.parse(text) for text in options.prompts]
        self.held_out = [Source.parse(text) for text in options.held_out]
        self.device = options.device or default_device()
        self.sizes = CPU if self.device == "cpu" else GPU
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.wait: Callable[[], None] = lambda: None  # until all processes have called it
        self.started = time.perf_counter()
        self.learned_from, self.measured_on = self.work / "prompts.jsonl", self.work / "held_out.jsonl"
        self.facts, self.planned = self.work / "prompts.json", self.work / "plan.json"
        self.responses, self.adapter = self.work / "responses", self.work / "adapter"
        self.tuned, self.measured = self.work / "tune.json", self.work / "speedup.json"
        _check_output(options.output)

    def run(self) -> dict[str, Any]:
        stages, dry_run = self.stages(), self.options.dry_run
        if state := process_group(self.processes):
            self.wait = state.wait_for_everyone
        Stages(self.work, stages[:2] if dry_run else stages, self.rank, self.wait).run()
        if dry_run:
            return {"plan": self.plan.as_dict()}
        return _read(self.options.output / FIGURES)

    def stages(self) -> list[Stage]:
        options = self.options
        asked = {
            "target": [options.model, weights_stamp(options.model)],
            "prompts": [source.stamp() for source in self.sources],
            "held_out": [source.stamp() for source in self.held_out],
            "prompt_template": options.prompt_template,
        }
        limits = {name: getattr(options, name) for name in ("minutes", "max_new_seq_len", "guess", "dtype")}
        if source := {name: getattr(options, name) for name in ("engine", "responses") if getattr(options, name) not in ("cllm", None)}:
            limits["source"] = source
        limits |= {"device": self.device, "processes": self.processes}
        written, planned = [self.learned_from, self.measured_on, self.facts], [self.planned, self.responses]
        published = [options.output / name for name in (ADAPTER, ADAPTER_WEIGHTS, "config.json", CARD, FIGURES)]
        return [
            Stage("prompts", "reading the prompts", self._read_prompts, written, asked),
            Stage("plan", "writing the first responses, timing training", self._plan, planned, limits, together=True),
            Stage("responses", "writing the remaining responses", self._respond, [], together=True),
            Stage("adapter", "training the adapter", self._train, [self.adapter], together=True),
            Stage("tune", "finding the fastest window on this device", self._tune, [self.tuned]),
            Stage("measure", "measuring on the held-out prompts", self._measure, [self.measured]),
            Stage("publish", f"writing {options.output}", self._publish, published),
        ]

    @property
    def plan(self) -> Plan:
        return Plan(**_read(self.planned))

    # ------------------------------------------------------------- the stages

    def _read_prompts(self) -> None:
        """Write the prompts to learn from and those to measure on, without duplicates, and the template they are asked in."""
        found, apart = gather(self.sources, "train"), gather(self.held_out, "test")
        found.leave_out(list(apart.examples), "held out as well")
        template = self._leave_out_unfit(found, apart)
        for reason, times in apart.skipped.items():
            found.count(f"held out, but {reason}", times)
        held_out = apart.examples if self.held_out else split_off(found)
        reasons = "".join(f"; {count} {reason}" for reason, count in found.skipped.items())
        if len(found.examples) < LEAST_PROMPTS or len(held_out) < LEAST_HELD_OUT:
            raise UsageError(
                f"at least {LEAST} prompts are needed, {LEAST_HELD_OUT} of them held out; "
                f"got {len(found.examples)} to learn from and {len(held_out)} held out{reasons}"
            )
        logger.info("%d prompts to learn from, %d held out%s", len(found.examples), len(held_out), reasons)
        for path, examples in ((self.learned_from, found.examples), (self.measured_on, held_out)):
            write_text(path, "".join(_row(example) for example in examples.values()))
        facts = {"prompts": len(found.examples), "held_out": len(held_out), "skipped": found.skipped}
        write_json(self.facts, facts | {"prompt_template": template, "data": [source.label for source in self.sources]})

    def _leave_out_unfit(self, *parts: Gathered) -> str:
        """Leave out prompts that cannot be answered; returns the template for the others."""
        tokenizer = load_tokenizer(self.options.model)
        context = context_length(load_config(self.options.model))
        templates = {source.task.plain_template for source in self.sources}
        plain = templates.pop() if len(templates) == 1 else get_task(OWN_PROMPTS).plain_template
        template = choose_template(self.options.prompt_template, plain, tokenizer, {})
        for part in parts:
            if tokenizer.chat_template is None and self.options.prompt_template is None:
                _check_no_conversations(part, self.options.model)
            for name, example in list(part.examples.items()):
                if reason := _unfit(example, template, tokenizer, context):
                    part.leave_out([name], reason)
        return template.text

    def _plan(self) -> None:
        """Time the first responses, a few training steps and one response decoded alone, and make the plan from that."""
        facts = self._facts()
        sampled = min(self.sizes.collected, facts["prompts"])
        if self.rank == 0:
            response = self._timed_responses(sampled) / (sampled * self.processes)
        self.wait()
        step, at_once = self._timed_step()
        if self.rank > 0:
            return
        rows = list(read_rows(self.responses))
        tokens = sum(len(row.response_ids) for row in rows) / len(rows)
        costs = Costs(
            response=response,
            example=step / (min(self._examples, len(rows)) * self.processes),
            token=self._timed_token(rows[0].prompt_ids),
            tokens=tokens,
            sampled=sampled,
            spent=time.perf_counter() - self.started - sampled * response,
            memory=peak_memory(),
            batch=self._examples * self.processes,
            at_once=at_once,
        )
        made = make_plan(costs, facts["prompts"], facts["held_out"], self.options.minutes)
        logger.info("the plan:\n%s", made)
        write_json(self.planned, made.as_dict())

    def _respond(self) -> None:
        collected = collect(self._collecting(self.plan.prompts, resume=True))
        collected.check()
        _log_departures(collected.compared, collected.departures)

    def _train(self) -> None:
        resuming = {"save_steps": CHECKPOINTS, "save_total_limit": 1, "resume_from_checkpoint": "True"}
        plan = self.plan
        train(*self._training(self.adapter, plan.at_once, num_train_epochs=plan.epochs, **resuming))
        if self.rank == 0:
            add_to_record(self.adapter, {DATA: self._facts()["data"]})

    def _tune(self) -> None:
        shorter = {"max_new_seq_len": min(TUNING_TOKENS, self.options.max_new_seq_len)}
        sample = self._decoding(self.learned_from, TUNING_PROMPTS) | shorter
        args = TuneArguments(widths=self.sizes.widths, guess=[self.options.guess], save=True, **sample)
        write_json(self.tuned, tune(args))

    def _measure(self) -> None:
        best = _read(self.tuned)["best"]["1"]
        window = {"block_size": best["width"], "drafts": best["drafts"], "guess": [best["guess"]]}
        args = SpeedArguments(**window, **self._decoding(self.measured_on, self._measurable()))
        write_json(self.measured, measure_speed(args))

    def _publish(self) -> None:
        """Store the window, or width 1 if it is not faster than AR; copy the adapter to the output and write the figures."""
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
        return _read(self.facts)

    def _measurable(self) -> int:
        """How many held-out prompts to measure on: with a limit, as many as the time that earlier stages left allows."""
        plan, minutes = self.plan, self.options.minutes
        if minutes is None:
            return plan.held_out
        spent = sum(Stages(self.work, []).seconds().values())
        return plan.measurable(60 * MARGIN * minutes - spent, self._facts()["held_out"])

    def _timed_responses(self, count: int) -> float:
        """Answer the first prompts, all at once; returns the seconds that this took without loading the model."""
        task = get_task(OWN_PROMPTS)
        stream = load_examples(task, self.learned_from, "train", count)
        collector, examples = make_collector(self._collecting(count, resume=False), task, stream.extent()), list(stream)
        own, seconds = collector.source.decoder if isinstance(collector.source, OwnEngine) else None, 0.0
        for _ in range(2 if own and own.runner.fixed else 1):  # where steps are captured, the first round captures them
            if own:
                own.prefixes.clear()
            with TrajectoryWriter(self.responses, collector.settings.as_dict(), resume=False) as writer:
                start = time.perf_counter()
                for _ in collector.run(examples, writer, batch_size=count):
                    pass
                seconds = time.perf_counter() - start
        _log_departures(collector.compared, collector.departures)
        return seconds

    def _timed_step(self) -> tuple[float, int]:
        """Seconds of a training step of all processes together, on the first responses, and how many of its examples fit into
        memory at once."""
        at_once = self._examples
        while True:
            try:
                return self._step_seconds(at_once), at_once
            except RuntimeError as error:
                if not out_of_memory(error) or at_once == 1 or self.processes > 1:
                    raise
            at_once //= 2
            free_memory()

    def _step_seconds(self, at_once: int) -> float:
        # the default order starts with the longest examples: that shows what fits into a GPU's memory, but overestimates the time
        order = {"train_sampling_strategy": "random"} if self.device == "cpu" else {}
        folder = self.work / "sample"
        trainer = build_trainer(*self._training(folder, at_once, max_steps=SAMPLE_STEPS, save_strategy="no", **order))
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
        shutil.rmtree(folder, ignore_errors=True)
        return clock.seconds

    @property
    def _examples(self) -> int:
        """Examples of a training step, per process. Several processes take the fewest, since one of them cannot shrink alone."""
        most = self.sizes.batch if self.processes == 1 else self.sizes.least
        prompts: int = self._facts()["prompts"]
        return min(most, max(self.sizes.least, prompts // EPOCH_STEPS))

    def _timed_token(self, prompt: list[int]) -> float:
        """Seconds of a token by AR decoding of a prompt alone, its prefill included."""
        model = load_model(
            self.options.model,
            dtype=self.options.dtype,
            device=self.device,
            attn_implementation=self.options.attn_implementation,
        )
        length, context = min(SAMPLE_TOKENS, self.options.max_new_seq_len), context_length(model.config)
        (run,) = measure([Engine(JacobiDecoder(model, 1), AR, AR)], [[prompt]], length, context=context).runs[AR]
        return run.seconds / len(run.responses[0].token_ids)

    def _collecting(self, count: int, resume: bool) -> CollectArguments:
        return CollectArguments(
            model=self.options.model,
            task=OWN_PROMPTS,
            filename=str(self.learned_from),
            output=str(self.responses),
            responses_only=True,
            data_size=count,
            block_size=LOSSLESS_BLOCK,
            max_new_seq_len=self.options.max_new_seq_len,
            batch_size=self.sizes.collected,
            guess=self.options.guess,
            resume=resume,
            prompt_template=self._facts()["prompt_template"],
            dtype=self._frozen,
            device=self.options.device,
            attn_implementation=self.options.attn_implementation,
            **{each.name: getattr(self.options, each.name) for each in fields(SourceOptions)},
        )

    def _training(self, folder: Path, at_once: int, **more: Any) -> tuple[TrainingInputs, LosslessTrainingArguments]:
        inputs = TrainingInputs(
            model=self.options.model,
            trajectories=str(self.responses),
            dtype=self._frozen or "float32",
            attn_implementation=self.options.attn_implementation,
        )
        args = LosslessTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=self._examples // at_once,
            logging_steps=8,
            report_to="none",
            bf16=self._bfloat16,
            use_cpu=self.device == "cpu",
            disable_tqdm=False,
            **more,
        )
        return inputs, args

    def _decoding(self, prompts: Path, count: int) -> dict[str, Any]:
        """What tuning and measuring are both given."""
        return {
            "model": str(self.adapter),
            "task": OWN_PROMPTS,
            "filename": str(prompts),
            "data_size": count,
            "max_new_seq_len": self.options.max_new_seq_len,
            "dtype": self.options.dtype,
            "device": self.options.device,
            "attn_implementation": self.options.attn_implementation,
        }

    @property
    def _bfloat16(self) -> bool:
        """Whether training and large batches are faster in bfloat16 on this device."""
        return self.device != "cpu" or has_bfloat16_products()

    @property
    def _frozen(self) -> Dtype | None:
        """The precision of the target model's weights where it writes responses and is trained for."""
        return self.options.dtype or ("bfloat16" if self._bfloat16 else None)

    def _figures(self, report: dict[str, Any], reason: str | None) -> dict[str, Any]:
        found, settings = report["methods"][JACOBI], report["settings"]
        names = ("tokens_per_forward", "tokens_per_second", "speedup", "same_as_ar")
        intervals = ("tokens_per_forward_interval", "speedup_interval")
        return {
            "plan": self.plan.as_dict(),
            "seconds": Stages(self.work, []).seconds(),
            "environment": report["environment"],
            "measured": settings["data_size"],
            "dtype": settings["dtype"],
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


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _log_departures(compared: int, departures: Mapping[str, Departure]) -> None:
    """Say how many responses of another engine are not the model's own."""
    for line in describe(compared, departures):
        logger.warning(line)


def _row(example: Example) -> str:
    return json.dumps({"messages": example.messages}, ensure_ascii=False) + "\n"


def _unfit(example: Example, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, context: int | None) -> str | None:
    """Why a prompt cannot be answered."""
    try:
        ids = template.encode(example.messages, tokenizer)
    except UsageError:
        return "refused by the chat template"
    return "too long for the model's context" if context is not None and len(ids) > context - LOSSLESS_BLOCK else None


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
