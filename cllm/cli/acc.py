"""Measure accuracy on a task."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.cli.command import (
    AUTO,
    add_guess_option,
    add_model_options,
    add_prefix_option,
    add_sampling_options,
    add_task_option,
    command,
    parser,
    positive,
    sampling_of,
)
from cllm.errors import UsageError, out_of_memory

if TYPE_CHECKING:
    from cllm.cli.model import OpenModel
    from cllm.decoding import Sampling
    from cllm.evaluation.accuracy import AnswerFile
    from cllm.tasks.base import Example

MATH_SINGLE = "math-single"

logger = logging.getLogger(__name__)


def options(task: str | None, argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    result = parser(
        "Answer a task's questions and score the replies. Run again, it goes on where it was stopped.",
        "cllm acc" if task is None else "acc.py",
    )
    add_task_option(result, task, "acc", argv)
    add_model_options(result, "--model_dir", required=False)
    result.add_argument("--use_consistency_decoding", action="store_true", help="Jacobi decoding; without it, autoregressive decoding")
    result.add_argument("--max_new_tokens_for_consistency", type=positive, help="block size; default: the checkpoint's own, else 16")
    add_guess_option(result)
    add_prefix_option(result)
    result.add_argument("--max_tokens", type=positive, default=1024, help="new tokens per reply at most")
    add_sampling_options(result)
    result.add_argument(
        "--prompt_type",
        choices=(MATH_SINGLE,),
        help="the task's plain text prompt (Question: ... Answer: Let's think step by step.) in the place of the "
        "tokenizer's chat template. Weaker than --prompt_template and than the template that a CLLM was trained with",
    )
    result.add_argument("--dev_set", default="all", help="only rows with this `source`, upper or lower case; all for every row")
    result.add_argument(
        "--filename",
        help="rows to answer; default: ./test.jsonl or ./test.jsonl.gz if there, else the task's own test rows: "
        "those of the hub, or of an installed package",
    )
    result.add_argument("--data_size", type=positive, help="questions at most")
    result.add_argument("--batch_size", type=positive, default=8, help="questions answered together")
    result.add_argument("--seed", type=int, default=0, help="of the draws, the fresh guesses and the bootstrap")
    result.add_argument("--output_file_name", help="JSONL file of answers; default: cllm_generated_TASK.jsonl")
    result.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="keep the answers of an earlier run")
    result.add_argument("--eval_only", action="store_true", help="score the answers there are; needs no --model_dir")
    result.add_argument("--results", help="JSON file of scores; default: OUTPUT_FILE_NAME's name with .accuracy.json")
    result.add_argument(
        "--export",
        metavar="FILE",
        help="the answers in the format of the dataset's own tools, if it has one; default: OUTPUT_FILE_NAME's name with .export.jsonl",
    )
    return result


@command
def main(argv: Sequence[str] | None = None, *, task: str | None = None) -> None:
    words = options(task, argv)
    args = words.parse_args(argv)
    if args.model is None and not args.eval_only:
        words.error("the following arguments are required: --model_dir")
    sampling_of(args, args.seed)  # an option that is out of range is refused before anything is loaded
    from cllm.files import write_json

    args.output_file_name = Path(args.output_file_name or f"cllm_generated_{args.task}.jsonl")
    args.results = args.results or args.output_file_name.with_suffix(".accuracy.json")
    try:
        report = rescore(args) if args.eval_only else run(args)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UsageError(
            f"out of memory at --batch_size {args.batch_size}; run again with a smaller one, finished answers are kept"
        ) from error
    write_json(args.results, report)
    print(render(report))
    print(f"\nAnswers: {args.output_file_name}\nScores:  {args.results}")
    if "export" in report:
        print(f"Export:  {report['export']}")


def rescore(args: argparse.Namespace) -> dict[str, Any]:
    """Score an answer file as it is."""
    from cllm.evaluation import accuracy
    from cllm.evaluation.environment import environment
    from cllm.files import read_jsonl_tolerant
    from cllm.result_file import read_settings
    from cllm.tasks import get_task

    if args.data_size:
        raise UsageError("--eval_only scores every answer there is; leave out --data_size")
    settings = read_settings(args.output_file_name) or {"task": args.task, "model": args.model}
    if settings.get("task") != args.task:
        raise UsageError(f"{args.output_file_name} holds answers of task {settings.get('task')!r}, not {args.task!r}")
    args.model = settings.get("model")
    task = get_task(args.task).configure(args)
    _check_export(args, task)
    found = read_jsonl_tolerant(args.output_file_name)
    if not found:
        raise UsageError(f"no answers in {args.output_file_name}")
    answers = accuracy.checked_answers(task.answers(found, _questions(args, task)), args.output_file_name)
    rows = {row["id"]: row for row in answers}
    chosen = accuracy.select(map(accuracy.example_of, answers), task, args.dev_set, None)
    if strange := [example.id for example in chosen if not task.judgeable(example)]:
        raise UsageError(f"{args.output_file_name} holds answers that are none of task {task.name!r}, such as {strange[0]}")
    scored = accuracy.rescore(task, [rows[e.id] for e in chosen])
    summary = accuracy.summarise(task, scored, seed=args.seed)
    settings |= {"dev_set": args.dev_set} | _scoring(task)
    report = {"settings": settings, "environment": environment("cpu"), "summary": summary}
    return _finish(args, task, scored, report)


def _questions(args: argparse.Namespace, task: Any) -> Iterator[Any]:
    """The examples that answers belong to, found only when a task looks at them."""
    from cllm.evaluation.prompt import default_file
    from cllm.tasks.source import load_examples

    yield from load_examples(task, default_file(args.filename, Path.cwd()), "test")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answer what is not answered yet, and score everything asked for."""
    from cllm.cli.guess import check_guess
    from cllm.cli.model import open_model
    from cllm.decoding import JacobiDecoder
    from cllm.evaluation import accuracy
    from cllm.evaluation.environment import check_writable, environment
    from cllm.evaluation.prompt import default_file
    from cllm.models import default_width
    from cllm.tasks import get_task
    from cllm.tasks.source import load_examples

    check_guess(args.guess)
    check_writable(args.results)
    check_writable(args.output_file_name)
    task = get_task(args.task).configure(args)
    sampling = _sampling(args, task)
    _check_export(args, task)
    stream = load_examples(task, default_file(args.filename, Path.cwd()), "test", None)
    questions = accuracy.select(stream, task, args.dev_set, args.data_size)
    examples = accuracy.samples(questions, task.num_samples)

    of = open_model(args, task.plain_template, partial(choose_prompt, prompt_type=args.prompt_type))
    block_size = 1
    if args.use_consistency_decoding:
        block_size = args.max_new_tokens_for_consistency or default_width(of.record)
    JacobiDecoder(of.model, block_size)  # refuses what cannot be decoded before anything is written
    settings = _settings(args, task, of, block_size, sampling)
    answers = accuracy.AnswerFile(args.output_file_name, settings, args.resume)
    _answer_missing(args, task, of, block_size, sampling, answers, examples)
    scored = accuracy.rescore(task, [answers.rows[e.id] for e in examples])
    asked = {
        "filename": stream.source,
        "dev_set": args.dev_set,
        "num_samples": task.num_samples,
        "batch_size": args.batch_size,
    }
    report = {
        "settings": settings | asked | _scoring(task),
        "environment": environment(of.model.device),
        "record": of.record,
        "bad_rows": dict(stream.bad),
        "summary": accuracy.summarise(task, scored, seed=args.seed),
    }
    return _finish(args, task, scored, report)


def _sampling(args: argparse.Namespace, task: Any) -> Sampling:
    sampling = sampling_of(args, args.seed)
    if task.num_samples > 1 and not sampling.draws:
        raise UsageError(
            f"num_samples must be 1 at temperature 0, got {task.num_samples}: greedy decoding gives the same sample every "
            "time; pass a --temperature above 0"
        )
    return sampling


def _answer_missing(
    args: argparse.Namespace,
    task: Any,
    of: OpenModel,
    block_size: int,
    sampling: Sampling,
    answers: AnswerFile,
    examples: Sequence[Example],
) -> None:
    """Decode the answers that the file does not have, and write them into it as they come."""
    from tqdm import tqdm

    from cllm.cli.guess import pick_guess
    from cllm.decoding import JacobiDecoder
    from cllm.evaluation import accuracy
    from cllm.evaluation.prompt import encode
    from cllm.models import context_length

    missing = [e for e in examples if not answers.has(e)]
    if kept := len(examples) - len(missing):
        logger.info("%d of %d answers are there already, in %s", kept, len(examples), args.output_file_name)
    prompts, too_long = encode(missing, of.template, of.tokenizer, context_length(of.model.config))
    asked = [p.ids for p in prompts]
    guess = pick_guess(args.guess, of, block_size, asked, batch_size=args.batch_size, sampling=sampling)
    decoder = JacobiDecoder(of.model, block_size, eos_token_ids=of.stops, guess=guess, seed=args.seed, prefix_cache=args.prefix_cache)
    if too_long:
        answers.append(accuracy.too_long_rows(task, too_long))
    with tqdm(total=len(prompts), desc="answers", unit="answer", file=sys.stderr, disable=None) as bar:
        for rows in accuracy.answer(
            decoder,
            of.tokenizer,
            task,
            prompts,
            of.template,
            max_new_tokens=args.max_tokens,
            batch_size=args.batch_size,
            sampling=sampling,
        ):
            answers.append(rows)
            bar.update(len(rows))


def _settings(args: argparse.Namespace, task: Any, of: OpenModel, block_size: int, sampling: Sampling) -> dict[str, Any]:
    """What the answers depend on; a run goes on with a file only if it is the same."""
    from cllm.decoding import make_guess
    from cllm.models import default_guess, weights_stamp

    settings = {
        "task": task.name,
        "model": args.model,
        "weights": weights_stamp(args.model),
        "prompt_template": of.template.text,
        "block_size": block_size,
        "max_tokens": args.max_tokens,
        "dtype": of.dtype,
        "attn_implementation": of.model.config._attn_implementation,
        "sampling": asdict(sampling),
        "seed": args.seed,
    }
    if args.use_consistency_decoding:
        name = args.guess or default_guess(of.record)
        settings["guess"] = name if name == AUTO else make_guess(name).name  # where it is auto, every run picks anew
    if task.settings():
        settings["task_options"] = task.settings()
    return settings


def _scoring(task: Any) -> dict[str, Any]:
    """How the answers are scored now, whatever an earlier run did."""
    options = task.scoring_settings()
    return {"scoring_options": options} if options else {}


def _check_export(args: argparse.Namespace, task: Any) -> None:
    from cllm.evaluation.environment import check_writable

    if args.export and task.export_format is None:
        raise UsageError(f"task {task.name!r} has no format of its own to --export answers in")
    args.export = Path(args.export or args.output_file_name.with_suffix(".export.jsonl"))
    if task.export_format is not None:
        check_writable(args.export)


def _finish(args: argparse.Namespace, task: Any, rows: list[dict[str, Any]], report: dict[str, Any]) -> dict[str, Any]:
    """Add what the task makes of all answers together. The scores are on the disk before, a review may take long."""
    from cllm.files import write_json

    if task.export(rows, args.export):
        report["export"] = str(args.export)
    write_json(args.results, report)
    if review := task.review(rows, args.output_file_name):
        report["review"] = review
    return report


def choose_prompt(option: str | None, plain: str, tokenizer: Any, record: dict[str, Any], *, prompt_type: str | None) -> Any:
    """``--prompt_template``, else what the checkpoint was trained with, else ``--prompt_type``, else the tokenizer's.

    The checkpoint's own template is stronger than ``--prompt_type``, since the paper's command always gives that
    one, and a CLLM asked in a form it was not trained on answers worse and slower.
    """
    from cllm.prompts import CHAT, PLAIN, choose_template

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


def render(report: dict[str, Any]) -> str:
    """The report as text for people."""
    from cllm.decoding import Sampling
    from cllm.prompts import PromptTemplate

    settings, summary = report["settings"], report["summary"]
    count = f"{summary['answers']} questions"
    if settings.get("num_samples", 1) > 1:
        count = f"{summary['answers']} answers ({settings['num_samples']} samples of each question)"
    model = settings.get("model") or "unknown model"
    head = [f"{model} on {settings.get('task')}, {count}; brackets: 95% intervals"]
    if "block_size" in settings:
        width = settings["block_size"]
        decoding = f"Jacobi decoding, block size {width}" if width > 1 else "autoregressive decoding"
        prompts = PromptTemplate(settings["prompt_template"]).label
        choices = Sampling(**settings.get("sampling", {})).label
        head.append(f"{decoding}, {choices}, {settings['dtype']}, {prompts}, up to {settings['max_tokens']} new tokens")
    if "scoring_options" in settings:
        facts = [f"{name}={value}" for name, value in settings["scoring_options"].items()]
        head.append(f"scored with {', '.join(facts)}")
    review = [_review_table(report["review"])] if report.get("review") else []
    return "\n".join([*head, "", _table(summary), *review, *_notes(report)])


def _table(summary: dict[str, Any]) -> str:
    from cllm.evaluation.table import format_table, number, percent_with_interval, with_interval

    names = list(summary["scores"])
    rows = []
    for title, part in {"all": summary, **summary["groups"]}.items():
        rows.append(
            [
                title,
                str(part["answers"]),
                *(percent_with_interval(part["scores"][n]["mean"], part["scores"][n]["interval"]) for n in names),
                with_interval(part["tokens_per_forward"], part["tokens_per_forward_interval"]),
                number(part["mean_tokens"], 1),
                str(part["unfinished"]),
            ]
        )
    return format_table(["", "questions", *names, "tokens per\nforward", "mean\ntokens", "cut at\nthe limit"], rows)


def _review_table(review: dict[str, dict[str, float | None]]) -> str:
    """What a task said of all answers together."""
    from cllm.evaluation.table import format_table, number

    columns = list(dict.fromkeys(name for figures in review.values() for name in figures))
    rows = [[title, *(number(figures.get(name), 2) for name in columns)] for title, figures in review.items()]
    return "\n" + format_table(["", *columns], rows)


def _notes(report: dict[str, Any]) -> list[str]:
    notes = []
    too_long = report["summary"]["too_long"]
    if too_long:
        some = ", ".join(too_long[:10])
        notes.append(f"{len(too_long)} prompts fill the model's context and count as wrong: {some}")
    if report.get("bad_rows"):
        notes.append("bad rows passed over: " + ", ".join(f"{why}: {n}" for why, n in report["bad_rows"].items()))
    return notes
