"""Speed of a model on a task's prompts by several methods, with the quality of its text beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.decoding import JacobiDecoder, make_guess
from cllm.errors import UsageError
from cllm.evaluation import method, prompt, speed
from cllm.evaluation.arguments import SpeedArguments
from cllm.evaluation.environment import environment
from cllm.evaluation.explain import explain
from cllm.evaluation.guess import check_guess, pick_guess
from cllm.evaluation.method_name import AR, JACOBI
from cllm.evaluation.quality import Quality, quality, response_nlls, score_replies
from cllm.models import context_length, default_width, load_tokenizer
from cllm.open_model import OpenModel, load_weights, open_model
from cllm.tasks.base import Task
from cllm.tasks.configure import configured_task
from cllm.tasks.source import load_examples

Texts = dict[str, list[list[int]]]  # whose responses -> token ids of each


def measure_speed(args: SpeedArguments) -> dict[str, Any]:
    """Decode a task's prompts by Jacobi iteration, by AR decoding and by the baselines asked for, in turns.

    Returns JSON values: ``settings``, ``environment`` and ``data``; for each of the ``methods`` tokens per forward, tokens per
    second and the speedup over AR, with 95% intervals; ``divergences`` from AR's text; the ``quality`` of the text, with
    ``target_model`` that of both models; and every response. :func:`cllm.evaluation.speed_text.render_speed` makes a text of it.
    Raises UsageError where models, prompts and options do not fit together.
    """
    for name in args.guess:
        check_guess(name)
    if args.explain and args.window == "block":
        raise UsageError("--explain is about sliding windows; leave out --window block")
    task = configured_task(args.task, "speedup", filename=args.filename, model=args.model, **args.task_options)
    stream = load_examples(task, prompt.default_file(args.filename, Path.cwd()), "test", args.data_size)
    examples = list(stream)
    opened, target, context = _open_models(args, task)
    prompts, too_long = prompt.encode(examples, opened.template, opened.tokenizer, context)
    if not prompts:
        raise UsageError(f"all {len(too_long)} prompts fill the model's context of {context} tokens")

    batches = [[each.ids for each in batch] for batch in prompt.batches(prompts, args.batch_size)]
    jacobi, methods, chosen = _methods(args, opened, prompts)
    measured = speed.measure(methods, batches, args.max_new_seq_len, context=context, progress=_bar("speed"))
    texts = {"jacobi": measured.texts(JACOBI)}
    if target is not None:
        texts["target"] = _target_texts(args, target, batches, context, opened.stops)
    qualities = _qualities(args, task, opened, target, prompts, texts, measured.texts(AR))
    asked = {"eos_token_ids": opened.stops, "filename": stream.source, "metric": task.metric}
    report = {
        "settings": _settings(args) | chosen | opened.facts | asked,
        "environment": environment(opened.model.device),
        "record": opened.record,
        "data": {
            "prompts": len(prompts),
            "too_long": [each.example.id for each in too_long],
            "bad_rows": dict(stream.bad),
            "context": context,
        },
        "labels": {each.name: each.label for each in methods},
        "methods": speed.summarise(measured, seed=args.seed),
        "divergences": speed.divergences(opened.model, measured, {each.example.id: each.ids for each in prompts}),
        "quality": {name: asdict(value) for name, value in qualities.items()},
        "batches": [
            {name: {"seconds": runs[at].seconds, "prefill_seconds": runs[at].prefill_seconds} for name, runs in measured.runs.items()}
            for at in range(len(batches))
        ],
        "prompts": _prompt_rows(prompts, measured, texts, opened.tokenizer, args.batch_size),
    }
    if args.explain:
        report["explanation"] = explain(jacobi, measured, [each.ids for each in prompts], batches).as_dict()
    return report


def _open_models(args: SpeedArguments, task: Task) -> tuple[OpenModel, PreTrainedModel | None, int | None]:
    """The test model, the target model if one is named, and the context that both have."""
    opened = open_model(args, task.plain_template)
    target = load_weights(args, args.target_model) if args.target_model else None
    if args.target_model and load_tokenizer(args.target_model).get_vocab() != opened.tokenizer.get_vocab():
        raise UsageError(f"{args.target_model} and {args.model} have different vocabularies, so they cannot be compared")
    contexts = [length for model in (opened.model, target) if model is not None and (length := context_length(model.config))]
    return opened, target, min(contexts, default=None)


def _methods(
    args: SpeedArguments, opened: OpenModel, prompts: Sequence[prompt.Prompt]
) -> tuple[method.Engine, list[method.Method], dict[str, Any]]:
    """The first way of Jacobi decoding, all methods, and the block size, drafts and guesses that were chosen for them."""
    block_size, ids = args.block_size or default_width(opened.record), [each.ids for each in prompts]
    named: Sequence[str | None] = args.guess or [None]
    picked = [pick_guess(name, opened, block_size, ids, batch_size=args.batch_size) for name in named]
    guesses = [make_guess(name) for name in dict.fromkeys(picked)]
    jacobi, *others = method.build_methods(
        opened.model,
        args.baseline,
        block_size=block_size,
        drafts=args.drafts,
        window=args.window,
        guesses=guesses,
        eos_ids=opened.stops,
        seed=args.seed,
        prefix_cache=args.prefix_cache,
    )
    assert isinstance(jacobi, method.Engine)
    chosen = {"block_size": block_size, "drafts": jacobi.decoder.step.drafts, "guess": [guess.name for guess in guesses]}
    return jacobi, [jacobi, *others], chosen


def _qualities(
    args: SpeedArguments,
    task: Task,
    opened: OpenModel,
    target: PreTrainedModel | None,
    prompts: Sequence[prompt.Prompt],
    texts: Texts,
    own_ar: list[list[int]],
) -> dict[str, Quality]:
    """How good each model's texts are; ``own_ar`` are the test model's by AR decoding."""
    qualities = {}
    for name, responses in texts.items():
        tested = name == "jacobi"
        qualities[name] = quality(
            responses,
            eos_ids=opened.stops,
            scores=score_replies(task, [each.example for each in prompts], responses, opened.tokenizer),
            nlls=response_nlls(target, [each.ids for each in prompts], responses) if target is not None else None,
            own_ar=own_ar if tested else None,
            target=texts.get("target") if tested else None,
            seed=args.seed,
        )
    return qualities


def _settings(args: SpeedArguments) -> dict[str, Any]:
    """The arguments without the block size: the report has the one that was chosen."""
    given = {name: value for name, value in asdict(args).items() if name not in ("model", "block_size", "task_options")}
    return {"test_model": args.model} | given | dict(args.task_options)


def _bar(title: str) -> speed.Progress:
    return lambda items: tqdm(items, desc=title, unit="batch", file=sys.stderr, disable=None)


def _target_texts(
    args: SpeedArguments, target: PreTrainedModel, batches: Sequence[list[list[int]]], context: int | None, eos_ids: Sequence[int]
) -> list[list[int]]:
    """The target model's own AR responses, under the budget that the test model had."""
    decoder = JacobiDecoder(target, 1, eos_token_ids=eos_ids, prefix_cache=args.prefix_cache)
    texts = []
    for batch in _bar("target model")(batches):
        results = decoder.generate(batch, max_new_tokens=speed.budget(batch, args.max_new_seq_len, context))
        texts += [result.token_ids for result in results]
    return texts


def _prompt_rows(
    prompts: Sequence[prompt.Prompt],
    measured: speed.Measurement,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> list[dict[str, Any]]:
    rows = []
    for at, asked in enumerate(prompts):
        expected, methods = measured.responses(AR)[at].token_ids, {}
        for name in measured.runs:
            response = measured.responses(name)[at]
            facts = {key: value for key, value in asdict(response).items() if key != "token_ids" and value is not None}
            same = response.token_ids == expected
            methods[name] = {"tokens": len(response.token_ids), **facts, "same_as_ar": same}
        row = {"id": asked.example.id, "prompt_tokens": len(asked.ids), "batch": at // batch_size, "methods": methods}
        responses = {name: tokenizer.decode(ids[at], skip_special_tokens=True) for name, ids in texts.items()}
        rows.append(row | {"responses": responses})
    return rows
