"""Accuracy of a model on a task: answers first, in a file that an interrupted run resumes from, then their scores."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cllm.decoding import JacobiDecoder, make_guess
from cllm.errors import UsageError
from cllm.evaluation import accuracy
from cllm.evaluation.arguments import AccuracyArguments
from cllm.evaluation.environment import check_writable, environment
from cllm.evaluation.guess import check_guess, pick_guess
from cllm.evaluation.prompt import default_file, encode
from cllm.files import read_jsonl_tolerant, write_json
from cllm.models import context_length, default_guess, default_width, weights_stamp
from cllm.open_model import OpenModel, open_model
from cllm.options import AUTO
from cllm.prompts import CHAT, PLAIN, PromptTemplate, choose_template
from cllm.result_file import Row, read_settings
from cllm.tasks.base import Example, Task
from cllm.tasks.configure import configured_task
from cllm.tasks.source import load_examples

logger = logging.getLogger(__name__)


def measure_accuracy(args: AccuracyArguments) -> dict[str, Any]:
    """Let a model answer a task's questions and score its replies.

    Answers go to ``args.answers_file`` as they finish; run again with the same arguments, it keeps them and answers the others.
    With ``args.eval_only`` the answers in that file are scored as they are, and no model is loaded.

    Returns what ``args.scores_file`` then holds: ``settings``, ``environment`` and a ``summary`` with the mean of each score
    (0 .. 1) and its 95% interval, tokens per forward and mean length, for all answers and for each group. Raises UsageError
    where the model, the task and its data, or the files do not fit together.
    """
    return _rescore(args) if args.eval_only else _answer_and_score(args)


def _rescore(args: AccuracyArguments) -> dict[str, Any]:
    """Score an answer file as it is."""
    file = args.answers_file
    if args.data_size:
        raise UsageError("--eval_only scores every answer there is; leave out --data_size")
    settings = read_settings(file) or {"task": args.task, "model": args.model or None}
    if settings.get("task") != args.task:
        raise UsageError(f"{file} holds answers of task {settings.get('task')!r}, not {args.task!r}")
    task = _task(replace(args, model=settings.get("model") or ""))
    found = read_jsonl_tolerant(file)
    if not found:
        raise UsageError(f"no answers in {file}")
    answers = accuracy.checked_answers(task.answers(found, _questions(args, task)), file)
    rows = {row["id"]: row for row in answers}
    chosen = accuracy.select(map(accuracy.example_of, answers), task, args.dev_set, None)
    if strange := [example.id for example in chosen if not task.judgeable(example)]:
        raise UsageError(f"{file} holds answers that are none of task {task.name!r}, such as {strange[0]}")
    scored = accuracy.rescore(task, [rows[example.id] for example in chosen])
    report = {
        "settings": settings | {"dev_set": args.dev_set} | _scoring(task),
        "environment": environment("cpu"),
        "summary": accuracy.summarise(task, scored, seed=args.seed),
    }
    return _finish(args, task, scored, report)


def _answer_and_score(args: AccuracyArguments) -> dict[str, Any]:
    """Answer what is not answered yet, and score everything asked for."""
    sampling = args.sampling(args.seed)
    check_guess(args.guess)
    check_writable(args.scores_file)
    check_writable(args.answers_file)
    task = _task(args)
    if task.num_samples > 1 and not sampling.draws:
        raise UsageError(
            f"num_samples must be 1 at temperature 0, got {task.num_samples}: greedy decoding gives the same sample every "
            "time; pass a --temperature above 0"
        )
    stream = load_examples(task, default_file(args.filename, Path.cwd()), "test", None)
    questions = accuracy.select(stream, task, args.dev_set, args.data_size)
    examples = accuracy.samples(questions, task.num_samples)

    opened = open_model(args, task.plain_template, partial(choose_prompt, prompt_type=args.prompt_type))
    block_size = (args.block_size or default_width(opened.record)) if args.use_consistency_decoding else 1
    JacobiDecoder(opened.model, block_size)  # refuses what cannot be decoded before anything is written
    settings = _settings(args, task, opened, block_size)
    answers = accuracy.AnswerFile(args.answers_file, settings, args.resume)
    _answer_missing(args, task, opened, block_size, answers, examples)
    scored = accuracy.rescore(task, [answers.rows[example.id] for example in examples])
    asked = {
        "filename": stream.source,
        "dev_set": args.dev_set,
        "num_samples": task.num_samples,
        "batch_size": args.batch_size,
    }
    report = {
        "settings": settings | asked | _scoring(task),
        "environment": environment(opened.model.device),
        "record": opened.record,
        "bad_rows": dict(stream.bad),
        "summary": accuracy.summarise(task, scored, seed=args.seed),
    }
    return _finish(args, task, scored, report)


def _task(args: AccuracyArguments) -> Task:
    """The task as the arguments want it, whose export can be written."""
    task = configured_task(args.task, "acc", filename=args.filename, model=args.model or None, **args.task_options)
    if args.export and task.export_format is None:
        raise UsageError(f"task {task.name!r} has no format of its own to --export answers in")
    if task.export_format is not None:
        check_writable(args.export_file)
    return task


def _questions(args: AccuracyArguments, task: Task) -> Iterator[Example]:
    """The examples that answers belong to, found only when a task looks at them."""
    yield from load_examples(task, default_file(args.filename, Path.cwd()), "test")


def _answer_missing(
    args: AccuracyArguments, task: Task, opened: OpenModel, block_size: int, answers: accuracy.AnswerFile, examples: Sequence[Example]
) -> None:
    """Decode the answers that the file does not have, and append them to it as they finish."""
    missing = [example for example in examples if not answers.has(example)]
    if kept := len(examples) - len(missing):
        logger.info("%d of %d answers are there already, in %s", kept, len(examples), args.answers_file)
    prompts, too_long = encode(missing, opened.template, opened.tokenizer, context_length(opened.model.config))
    how: dict[str, Any] = {"batch_size": args.batch_size, "sampling": args.sampling(args.seed)}
    guess = pick_guess(args.guess, opened, block_size, [prompt.ids for prompt in prompts], **how)
    decoder = JacobiDecoder(
        opened.model, block_size, eos_token_ids=opened.stops, guess=guess, seed=args.seed, prefix_cache=args.prefix_cache
    )
    if too_long:
        answers.append(accuracy.too_long_rows(task, too_long))
    batches = accuracy.answer(decoder, opened.tokenizer, task, prompts, opened.template, max_new_tokens=args.max_tokens, **how)
    with tqdm(total=len(prompts), desc="answers", unit="answer", file=sys.stderr, disable=None) as bar:
        for rows in batches:
            answers.append(rows)
            bar.update(len(rows))


def _settings(args: AccuracyArguments, task: Task, opened: OpenModel, block_size: int) -> dict[str, Any]:
    """What the answers depend on; a run goes on with a file only if it is the same."""
    settings = {
        "task": task.name,
        "model": args.model,
        "weights": weights_stamp(args.model),
        **opened.facts,
        "block_size": block_size,
        "max_tokens": args.max_tokens,
        "sampling": asdict(args.sampling(args.seed)),
        "seed": args.seed,
    }
    if args.use_consistency_decoding:
        name = args.guess or default_guess(opened.record)
        settings["guess"] = name if name == AUTO else make_guess(name).name  # where it is auto, every run picks anew
    if task.settings():
        settings["task_options"] = task.settings()
    return settings


def _scoring(task: Task) -> dict[str, Any]:
    """How the answers are scored now, whatever an earlier run did."""
    options = task.scoring_settings()
    return {"scoring_options": options} if options else {}


def _finish(args: AccuracyArguments, task: Task, rows: list[Row], report: dict[str, Any]) -> dict[str, Any]:
    """Write the report, with what the task makes of all answers together. A review may take long, so scores are written first."""
    if task.export(rows, args.export_file):
        report["export"] = str(args.export_file)
    write_json(args.scores_file, report)
    if review := task.review(rows, args.answers_file):
        report["review"] = review
        write_json(args.scores_file, report)
    return report


def choose_prompt(option: str | None, plain: str, tokenizer: Any, record: dict[str, Any], *, prompt_type: str | None) -> PromptTemplate:
    """``--prompt_template``, else what the checkpoint was trained with, else ``--prompt_type``, else the tokenizer's.

    The checkpoint's own template takes precedence over ``--prompt_type``: the paper's command always gives that one, and a CLLM
    asked in a form it was not trained on answers worse and slower.
    """
    trained_with = record.get("prompt_template")
    if prompt_type and not option and not trained_with:
        if tokenizer.chat_template:
            logger.info("--prompt_type %s: plain prompts; --prompt_template chat uses the chat template", prompt_type)
        option = PLAIN
    template = choose_template(option, plain, tokenizer, record)
    if prompt_type and not option and template.text != plain:
        name = "the chat template" if template.text == CHAT else repr(template.text)
        logger.info(
            "the model was trained with %s, which is used; --prompt_type %s is not (--prompt_template plain forces it)",
            name,
            prompt_type,
        )
    return template
