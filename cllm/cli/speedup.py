"""Measure decoding speed, and the quality of the text beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.cli.command import add_guess_option, add_model_options, add_prefix_option, add_task_option, command, parser, positive
from cllm.errors import UsageError, out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cllm.cli.model import OpenModel
    from cllm.evaluation.method import Method
    from cllm.evaluation.prompt import Prompt
    from cllm.evaluation.quality import Quality

SHOWN_DIVERGENCES = 5


def options(task: str | None, argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    from cllm.evaluation.method_name import BASELINES

    result = parser(
        "Tokens per forward and per second of Jacobi decoding against autoregressive (AR) decoding of the same model.",
        "cllm speedup" if task is None else "speedup.py",
    )
    add_task_option(result, task, "speedup", argv)
    add_model_options(result, "--test_model")
    result.add_argument("--max_new_tokens", type=positive, help="block size; default: the checkpoint's own, else 16")
    result.add_argument("--drafts", type=int, help="draft tokens of a consistency adapter; default: what `cllm tune` stored, else one less")
    result.add_argument("--filename", help="rows to take prompts from; default: ./test.jsonl or ./test.jsonl.gz if there, else the hub")
    result.add_argument("--data_size", type=positive, default=500, help="prompts at most")
    result.add_argument("--max_new_seq_len", type=positive, default=512, help="new tokens per response at most")
    result.add_argument("--batch_size", type=positive, default=1, help="prompts decoded together")
    result.add_argument(
        "--baseline",
        action="extend",
        nargs="+",
        choices=BASELINES,
        default=[],
        help="more to compare with, may be repeated; no_adapter: the same window without the model's consistency adapter; "
        "generate and prompt_lookup are Hugging Face's; ar is always there",
    )
    result.add_argument("--window", choices=("sliding", "block"), default="sliding", help="block: the paper's procedure")
    add_guess_option(result, several=True)
    add_prefix_option(result)
    result.add_argument("--target_model", metavar="PATH", help="the model before training: adds its text's quality, side by side")
    result.add_argument(
        "--explain",
        action="store_true",
        help="say in figures why the speedup is less than the tokens per forward, and what looks like a fault",
    )
    result.add_argument("--seed", type=int, default=0, help="of the fresh guesses and of the bootstrap")
    result.add_argument("--output", default="speedup.json", help="where the results go")
    return result


@command
def main(argv: Sequence[str] | None = None, *, task: str | None = None) -> None:
    args = options(task, argv).parse_args(argv)
    try:
        report = run(args)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UsageError(f"out of memory at --batch_size {args.batch_size}; try a smaller one") from error
    from cllm.files import write_json

    write_json(args.output, report)
    print(render(report))
    print(f"\nAll figures, settings and responses: {args.output}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns what goes into the JSON file."""
    from cllm.cli.guess import check_guess
    from cllm.evaluation import method, prompt, speed
    from cllm.evaluation.environment import check_writable, environment
    from cllm.tasks import get_task
    from cllm.tasks.source import load_examples

    for name in args.guess or []:
        check_guess(name)
    if args.explain and args.window == "block":
        raise UsageError("--explain is about sliding windows; leave out --window block")
    check_writable(args.output)
    task = get_task(args.task).configure(args)
    stream = load_examples(task, prompt.default_file(args.filename, Path.cwd()), "test", args.data_size)
    examples = list(stream)
    of, target, context = _open_models(args, task)
    prompts, too_long = prompt.encode(examples, of.template, of.tokenizer, context)
    if not prompts:
        raise UsageError(f"all {len(too_long)} prompts fill the model's context of {context} tokens")

    batches = [[p.ids for p in batch] for batch in prompt.batches(prompts, args.batch_size)]
    methods, chosen = _methods(args, of, prompts)
    measured = speed.measure(methods, batches, args.max_new_seq_len, context=context, progress=_bar("speed"))
    texts = {"jacobi": _ids(measured, method.JACOBI)}
    if target is not None:
        texts["target"] = _target_texts(target, batches, args.max_new_seq_len, context, of.stops, args.prefix_cache)
    qualities = _qualities(args, task, of, target, prompts, texts, _ids(measured, method.AR))
    explanation = {}
    if args.explain:
        from cllm.evaluation.explain import explain

        jacobi: Any = methods[0]
        explanation = {"explanation": explain(jacobi, measured, [p.ids for p in prompts], batches).as_dict()}
    return {
        "settings": _settings(args) | chosen | _facts(of) | {"filename": stream.source, "metric": task.metric},
        "environment": environment(of.model.device),
        "record": of.record,
        "data": {
            "prompts": len(prompts),
            "too_long": [p.example.id for p in too_long],
            "bad_rows": dict(stream.bad),
            "context": context,
        },
        "labels": {m.name: m.label for m in methods},
        "methods": speed.summarise(measured, seed=args.seed),
        "divergences": speed.divergences(of.model, measured, {p.example.id: p.ids for p in prompts}),
        "quality": {name: asdict(value) for name, value in qualities.items()},
        **explanation,
        "batches": _batch_rows(measured, len(batches)),
        "prompts": _prompt_rows(prompts, measured, texts, of.tokenizer, args.batch_size),
    }


def _open_models(args: argparse.Namespace, task: Any) -> tuple[OpenModel, PreTrainedModel | None, int | None]:
    """The test model, the target model if one is named, and the context that both have."""
    from cllm.cli.model import load_weights, open_model
    from cllm.models import context_length, load_tokenizer

    of = open_model(args, task.plain_template)
    target = load_weights(args, args.target_model) if args.target_model else None
    if target is not None and load_tokenizer(args.target_model).get_vocab() != of.tokenizer.get_vocab():
        raise UsageError(f"{args.target_model} and {args.model} have different vocabularies, so they cannot be compared")
    contexts = [length for m in (of.model, target) if m is not None and (length := context_length(m.config))]
    return of, target, min(contexts, default=None)


def _methods(args: argparse.Namespace, of: OpenModel, prompts: Sequence[Prompt]) -> tuple[list[Method], dict[str, Any]]:
    """What to measure, and the block size and guesses that the options came to."""
    from cllm.cli.guess import pick_guess
    from cllm.decoding import make_guess
    from cllm.evaluation.method import build_methods
    from cllm.models import default_width

    block_size = args.max_new_tokens or default_width(of.record)
    picked = [pick_guess(name, of, block_size, [p.ids for p in prompts], batch_size=args.batch_size) for name in args.guess or [None]]
    guesses = [make_guess(name) for name in dict.fromkeys(picked)]
    methods = build_methods(
        of.model,
        args.baseline,
        block_size=block_size,
        drafts=args.drafts,
        window=args.window,
        guesses=guesses,
        eos_ids=of.stops,
        seed=args.seed,
        prefix_cache=args.prefix_cache,
    )
    drafts = methods[0].decoder.step.drafts  # type: ignore[attr-defined]
    return methods, {"block_size": block_size, "drafts": drafts, "guess": [guess.name for guess in guesses]}


def _qualities(
    args: argparse.Namespace,
    task: Any,
    of: OpenModel,
    target: PreTrainedModel | None,
    prompts: Sequence[Prompt],
    texts: dict[str, list[list[int]]],
    own_ar: list[list[int]],
) -> dict[str, Quality]:
    """How good each model's texts are; ``own_ar`` are the test model's by AR decoding."""
    from cllm.evaluation import quality

    qualities = {}
    for name, responses in texts.items():
        tested = name == "jacobi"
        qualities[name] = quality.quality(
            responses,
            eos_ids=of.stops,
            scores=quality.score_replies(task, [p.example for p in prompts], responses, of.tokenizer),
            nlls=quality.response_nlls(target, [p.ids for p in prompts], responses) if target is not None else None,
            own_ar=own_ar if tested else None,
            target=texts.get("target") if tested else None,
            seed=args.seed,
        )
    return qualities


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options under their own names; the block size is reported as what it came to."""
    given = {key: value for key, value in vars(args).items() if key not in ("model", "max_new_tokens")}
    return {"test_model": args.model} | given


def _facts(of: OpenModel) -> dict[str, Any]:
    """How the test model was opened."""
    return {
        "prompt_template": of.template.text,
        "dtype": of.dtype,
        "attn_implementation": of.model.config._attn_implementation,
        "eos_token_ids": of.stops,
    }


def _bar(title: str) -> Any:
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=title, unit="batch", file=sys.stderr, disable=None)


def _ids(measured: Any, name: str) -> list[list[int]]:
    return [response.token_ids for response in measured.responses(name)]


def _target_texts(
    target: Any, batches: list, max_new_tokens: int, context: int | None, eos_ids: list, prefix_cache: int
) -> list[list[int]]:
    """The target model's own AR responses, under the budget that the test model had."""
    from cllm.decoding import JacobiDecoder
    from cllm.evaluation.speed import budget

    decoder = JacobiDecoder(target, 1, eos_token_ids=eos_ids, prefix_cache=prefix_cache)
    texts = []
    for batch in _bar("target model")(batches):
        results = decoder.generate(batch, max_new_tokens=budget(batch, max_new_tokens, context))
        texts += [result.token_ids for result in results]
    return texts


def _batch_rows(measured: Any, batches: int) -> list[dict[str, Any]]:
    return [
        {name: {"seconds": runs[at].seconds, "prefill_seconds": runs[at].prefill_seconds} for name, runs in measured.runs.items()}
        for at in range(batches)
    ]


def _prompt_rows(prompts: Any, measured: Any, texts: dict, tokenizer: Any, batch_size: int) -> list[dict[str, Any]]:
    from cllm.evaluation.method_name import AR

    rows = []
    for at, prompt in enumerate(prompts):
        row: dict[str, Any] = {"id": prompt.example.id, "prompt_tokens": len(prompt.ids), "batch": at // batch_size}
        row["methods"] = {}
        expected = measured.responses(AR)[at].token_ids
        for name in measured.runs:
            response = measured.responses(name)[at]
            facts = {key: value for key, value in asdict(response).items() if key != "token_ids" and value is not None}
            row["methods"][name] = {
                "tokens": len(response.token_ids),
                **facts,
                "same_as_ar": response.token_ids == expected,
            }
        row["responses"] = {name: tokenizer.decode(responses[at], skip_special_tokens=True) for name, responses in texts.items()}
        rows.append(row)
    return rows


def render(report: dict[str, Any]) -> str:
    """The report as text for people."""
    parts = [_head(report), _speed_table(report), _gain_table(report), *_notes(report), _quality_table(report)]
    if "explanation" in report:
        from cllm.evaluation.explain import render_explanation

        parts.append(render_explanation(report["explanation"]))
    return "\n\n".join(part for part in parts if part)


def _head(report: dict[str, Any]) -> str:
    settings, data, on = report["settings"], report["data"], report["environment"]
    from cllm.prompts import PromptTemplate

    prompts = PromptTemplate(settings["prompt_template"]).label
    precision = f"{settings['dtype']}, {settings['attn_implementation']} attention"
    machine = f"{on['device']} ({on['device_name']}, {on['threads']} threads)"
    limits = f"up to {settings['max_new_seq_len']} new tokens, batch size {settings['batch_size']}, {_reuse(settings)}"
    lines = [
        f"{settings['test_model']}: {precision}, on {machine}",
        f"{data['prompts']} prompts of {settings['task']} ({settings['filename']}), {prompts}",
        f"{limits}; brackets: 95% intervals",
    ]
    if data["too_long"]:
        lines.append(
            f"left out: {len(data['too_long'])} prompts that fill the context of {data['context']} tokens: "
            + ", ".join(data["too_long"][:10])
        )
    if data["bad_rows"]:
        lines.append("bad rows passed over: " + ", ".join(f"{why}: {n}" for why, n in data["bad_rows"].items()))
    return "\n".join(lines)


def _reuse(settings: dict[str, Any]) -> str:
    """Whether our engine, in AR and Jacobi decoding alike, began prompts where earlier ones part from them."""
    budget = settings.get("prefix_cache")
    return f"prefix reuse within {budget / 2**20:g} MiB for each of our methods" if budget else "no prefix reuse"


def _speed_table(report: dict[str, Any]) -> str:
    from cllm.evaluation.table import format_table, number, percent, with_interval

    header = ["method", "tokens per\nforward", "tokens/s", "speedup\nover AR", "seconds", "of which\nprefill"]
    rows = []
    for name, of in report["methods"].items():
        cells = [
            report["labels"][name],
            with_interval(of["tokens_per_forward"], of["tokens_per_forward_interval"]),
            number(of["tokens_per_second"], 1),
            with_interval(of["speedup"], of["speedup_interval"]),
            number(of["seconds"], 1),
            number(of["prefill_seconds"], 1),
            percent(of["same_as_ar"]),
        ]
        rows.append(cells)
    return format_table([*header, "same text\nas AR"], rows)


def _gain_table(report: dict[str, Any]) -> str:
    """Where Jacobi decoding's tokens came from."""
    from cllm.evaluation.method_name import is_jacobi
    from cllm.evaluation.table import format_table, number

    tables = []
    for name, of in report["methods"].items():
        if is_jacobi(name):
            rows = [
                [f"{kind.replace('_', '-')} tokens", *(number(of[f"{kind}_per_{per}"]) for per in ("response", "forward"))]
                for kind in ("fast_forwarded", "stationary")
            ]
            tables.append(format_table([report["labels"][name], "per response", "per forward"], rows))
    return "\n\n".join(tables)


def _notes(report: dict[str, Any]) -> list[str]:
    from cllm.evaluation.method_name import is_jacobi

    notes = []
    if "prompt_lookup" in report["methods"] and report["settings"]["batch_size"] > 1:
        notes.append("Hugging Face's prompt lookup takes one prompt at a time; it was run so.")
    parted = report["divergences"]
    if parted:
        lines = [f"{len(parted)} responses part from AR's (token counted from 0; margin in logits):"]
        for d in parted[:SHOWN_DIVERGENCES]:
            where = f"  {report['labels'][d['method']]}, {d['id']}, token {d['token']}: "
            lines.append(where + _margin(d))
        if len(parted) > SHOWN_DIVERGENCES:
            lines.append(f"  ... and {len(parted) - SHOWN_DIVERGENCES} more in the JSON file")
        notes.append("\n".join(lines))
    if report["settings"]["dtype"] == "float32" and any(is_jacobi(d["method"]) for d in parted):
        notes.append(
            "WARNING: in float32 Jacobi decoding must write what AR decoding writes. Unless a margin above is tiny "
            "(a tie), this is a defect: please report it."
        )
    return notes


def _margin(where: dict[str, Any]) -> str:
    if where["margin"] is None:
        return "one ends where the other goes on"
    return f"id {where['other_choice']} for {where['ar_choice']}, margin {where['margin']:.2g}"


def _quality_table(report: dict[str, Any]) -> str:
    from cllm.evaluation.quality import Quality, quality_table

    titles = {"jacobi": "test model", "target": "target model"}
    columns = {titles[name]: Quality(**value) for name, value in report["quality"].items()}
    table = quality_table(columns, report["settings"]["metric"])
    if "target" not in report["quality"]:
        table += "\nPass --target_model to see the model before training beside it."
    return table
