"""The results of a GPU run as rows for README's table, and what falls short of what was hoped for:  python table.py RESULTS"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm.evaluation.table import number, percent, with_interval

TITLES = {"sql": "SmolLM2-135M, questions to SQL", "gsm8k": "SmolLM2-135M, GSM8K"}
SPEEDUPS = {"sql": 3.0, "gsm8k": 2.0}  # over captured AR decoding at batch 1
OVER_EAGER = 2.0  # AR decoding over Hugging Face's
WIDE_STEP = 1.15  # a step of width 16 over AR's


def main(folder: Path) -> None:
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    print("\n| model and data | hardware | tokens per forward | speedup over AR | accuracy | text equal to the target's |")
    print("|---|---|---|---|---|---|")
    for name in [name for name in TITLES if name in found]:
        print(row(name, found[name]))
    print()
    for text, holds in goals(found):
        print(f"{'holds' if holds else 'FALLS SHORT'}: {text}")


def row(name: str, report: dict[str, Any]) -> str:
    of, where, settings = report["methods"]["jacobi"], report["environment"], report["settings"]
    rehearsal = "REHEARSAL on " if report["rehearsal"] else ""
    cells = [
        f"{TITLES[name]}, {report['data']['prompts']} held out",
        f"{rehearsal}{where['device_name']}, {settings['dtype']}",
        with_interval(of["tokens_per_forward"], of["tokens_per_forward_interval"]),
        with_interval(of["speedup"], of["speedup_interval"]),
        percent(report["quality"]["jacobi"]["score"]),
        percent(of["same_as_ar"]),
    ]
    return f"| {' | '.join(cells)} |"


def goals(found: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What was hoped for, with the figure, and whether it came true."""
    if "environment" in found:
        equal = found["environment"]["result"]["captured iterations equal"]
        yield "captured iterations are those that run as they are", equal
    if "tests" in found:
        tests = found["tests"]["result"]
        failed, left = len(tests["failures"]), len(tests["not run"])
        yield f"tests marked gpu: {tests.get('passed', 0)} passed, {failed} failed, {left} not run", not failed + left
    if "speed" in found:
        yield from _speed_goals(found["speed"]["result"])
    for name, least in SPEEDUPS.items():
        if name in found:
            yield from _recipe_goals(name, found[name], least)


def _speed_goals(result: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    waits, over = sum(result["waits of the device in 32 steps"].values()), result["AR over Hugging Face, eager"]
    yield f"in 32 steps the device waits {waits} times for the host, once at most (the profiler's own)", waits <= 1
    yield f"AR decoding is {number(over)} times as fast as Hugging Face's, at least {OVER_EAGER}", over >= OVER_EAGER
    wide = result["steps"]["batch 1"].get("width 16", {}).get("over AR's")
    if wide is not None:
        yield f"a step of width 16 takes {number(wide)} times AR's, at most {WIDE_STEP}", wide <= WIDE_STEP


def _recipe_goals(name: str, report: dict[str, Any], least: float) -> Iterator[tuple[str, bool]]:
    speedup, texts = report["methods"]["jacobi"]["speedup"], report["texts"]
    yield f"{name}: {number(speedup)} times captured AR decoding, at least {least}", speedup >= least
    departed = texts["float32"]["Jacobi"]["texts that depart"]
    yield f"{name}: {departed} texts depart from AR's in float32", departed == 0
    rates = {side: of["departures per 1,000 tokens"] for side, of in texts["bfloat16"].items()}
    jacobi, batches = rates.pop("Jacobi"), max(rates.values())
    text = f"{name}: in bfloat16 {number(jacobi)} departures per 1,000 tokens, AR's own between batch sizes {number(batches)}"
    yield text, jacobi <= batches


if __name__ == "__main__":
    main(Path(sys.argv[1]))
