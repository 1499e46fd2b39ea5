"""A report of accuracy as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cllm.decoding import Sampling
from cllm.evaluation.table import format_table, number, percent_with_interval, with_interval
from cllm.prompts import PromptTemplate

MOST_NAMED = 10  # prompts too long for the context


def render_accuracy(report: Mapping[str, Any]) -> str:
    """What :func:`cllm.evaluation.accuracy_run.measure_accuracy` returned, as text."""
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


def _table(summary: Mapping[str, Any]) -> str:
    names = list(summary["scores"])
    rows = [
        [
            title,
            str(part["answers"]),
            *(percent_with_interval(part["scores"][name]["mean"], part["scores"][name]["interval"]) for name in names),
            with_interval(part["tokens_per_forward"], part["tokens_per_forward_interval"]),
            number(part["mean_tokens"], 1),
            str(part["unfinished"]),
        ]
        for title, part in {"all": summary, **summary["groups"]}.items()
    ]
    return format_table(["", "questions", *names, "tokens per\nforward", "mean\ntokens", "cut at\nthe limit"], rows)


def _review_table(review: Mapping[str, Mapping[str, float | None]]) -> str:
    """What a task says about all answers together."""
    columns = list(dict.fromkeys(name for figures in review.values() for name in figures))
    rows = [[title, *(number(figures.get(name), 2) for name in columns)] for title, figures in review.items()]
    return "\n" + format_table(["", *columns], rows)


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = []
    if too_long := report["summary"]["too_long"]:
        notes.append(f"{len(too_long)} prompts fill the model's context and count as wrong: {', '.join(too_long[:MOST_NAMED])}")
    if report.get("bad_rows"):
        notes.append("bad rows skipped: " + ", ".join(f"{why}: {count}" for why, count in report["bad_rows"].items()))
    return notes
