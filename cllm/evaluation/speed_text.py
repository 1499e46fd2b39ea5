"""The report of ``cllm speedup`` as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cllm.evaluation.explain import render_explanation
from cllm.evaluation.method_name import is_jacobi
from cllm.evaluation.quality import Quality, quality_table
from cllm.evaluation.table import format_table, number, percent, with_interval
from cllm.prompts import PromptTemplate

SHOWN_DIVERGENCES = 5
MOST_NAMED = 10  # prompts too long for the context


def render_speed(report: Mapping[str, Any]) -> str:
    """The result of :func:`cllm.evaluation.speed_run.measure_speed`, as text."""
    parts = [_head(report), _speed_table(report), _gain_table(report), *_notes(report), _quality_table(report)]
    if "explanation" in report:
        parts.append(render_explanation(report["explanation"]))
    return "\n\n".join(part for part in parts if part)


def _head(report: Mapping[str, Any]) -> str:
    settings, data, machine = report["settings"], report["data"], report["environment"]
    prompts = PromptTemplate(settings["prompt_template"]).label
    precision = f"{settings['dtype']}, {settings['attn_implementation']} attention"
    limits = f"up to {settings['max_new_seq_len']} new tokens, batch size {settings['batch_size']}, {_reuse(settings)}"
    lines = [
        f"{settings['test_model']}: {precision}, on {machine['device']} ({machine['device_name']}, {machine['threads']} threads)",
        f"{data['prompts']} prompts of {settings['task']} ({settings['filename']}), {prompts}",
        f"{limits}; brackets: 95% intervals",
    ]
    if too_long := data["too_long"]:
        some = ", ".join(too_long[:MOST_NAMED])
        lines.append(f"left out: {len(too_long)} prompts that fill the context of {data['context']} tokens: {some}")
    if data["bad_rows"]:
        lines.append("bad rows skipped: " + ", ".join(f"{why}: {count}" for why, count in data["bad_rows"].items()))
    return "\n".join(lines)


def _reuse(settings: Mapping[str, Any]) -> str:
    """Whether our engine, in AR and Jacobi decoding alike, reused keys and values of prompts that start alike."""
    budget = settings.get("prefix_cache")
    return f"prefix reuse within {budget / 2**20:g} MiB for each of our methods" if budget else "no prefix reuse"


def _speed_table(report: Mapping[str, Any]) -> str:
    header = ["method", "tokens per\nforward", "tokens/s", "speedup\nover AR", "seconds", "of which\nprefill"]
    rows = [
        [
            report["labels"][name],
            with_interval(figures["tokens_per_forward"], figures["tokens_per_forward_interval"]),
            number(figures["tokens_per_second"], 1),
            with_interval(figures["speedup"], figures["speedup_interval"]),
            number(figures["seconds"], 1),
            number(figures["prefill_seconds"], 1),
            percent(figures["same_as_ar"]),
        ]
        for name, figures in report["methods"].items()
    ]
    return format_table([*header, "same text\nas AR"], rows)


def _gain_table(report: Mapping[str, Any]) -> str:
    """Where Jacobi decoding's tokens came from."""
    tables = []
    for name, figures in report["methods"].items():
        if is_jacobi(name):
            rows = [
                [f"{kind.replace('_', '-')} tokens", *(number(figures[f"{kind}_per_{per}"]) for per in ("response", "forward"))]
                for kind in ("fast_forwarded", "stationary")
            ]
            tables.append(format_table([report["labels"][name], "per response", "per forward"], rows))
    return "\n\n".join(tables)


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = []
    if "prompt_lookup" in report["methods"] and report["settings"]["batch_size"] > 1:
        notes.append("Hugging Face's prompt lookup takes one prompt at a time; it was run so.")
    if divergences := report["divergences"]:
        lines = [f"{len(divergences)} responses part from AR's (token counted from 0; margin in logits):"]
        for each in divergences[:SHOWN_DIVERGENCES]:
            lines.append(f"  {report['labels'][each['method']]}, {each['id']}, token {each['token']}: {_margin(each)}")
        if len(divergences) > SHOWN_DIVERGENCES:
            lines.append(f"  ... and {len(divergences) - SHOWN_DIVERGENCES} more in the JSON file")
        notes.append("\n".join(lines))
    if report["settings"]["dtype"] == "float32" and any(is_jacobi(each["method"]) for each in divergences):
        notes.append(
            "WARNING: in float32 Jacobi decoding must write what AR decoding writes. Unless a margin above is tiny "
            "(a tie), this is a defect: please report it."
        )
    return notes


def _margin(divergence: Mapping[str, Any]) -> str:
    if divergence["margin"] is None:
        return "one ends where the other goes on"
    return f"id {divergence['other_choice']} for {divergence['ar_choice']}, margin {divergence['margin']:.2g}"


def _quality_table(report: Mapping[str, Any]) -> str:
    titles = {"jacobi": "test model", "target": "target model"}
    columns = {titles[name]: Quality(**value) for name, value in report["quality"].items()}
    table = quality_table(columns, report["settings"]["metric"])
    if "target" not in report["quality"]:
        table += "\nPass --target_model to see the model before training beside it."
    return table
