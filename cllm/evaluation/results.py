"""Result files of this project, read back for a report: what each kind says, and which files are not results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.errors import UsageError
from cllm.evaluation.interval import Interval
from cllm.evaluation.method_name import AR, is_jacobi

MOST_BYTES = 1 << 26  # of a file that is read; result files are far smaller


@dataclass(frozen=True)
class MethodSpeed:
    """One method in one run of ``speedup``."""

    label: str
    tokens_per_forward: float
    tokens_per_forward_interval: Interval | None
    tokens_per_second: float
    speedup: float | None
    speedup_interval: Interval | None
    gains: list[int]  # tokens accepted by each forward, of all prompts; [] where only the sum is known
    is_jacobi: bool


@dataclass(frozen=True)
class Speed:
    """A run of ``speedup``. ``tokens_per_forward`` is that of the first Jacobi method."""

    name: str
    model: str
    task: str
    device: str
    width: int
    methods: list[MethodSpeed]

    @property
    def tokens_per_forward(self) -> float:
        return next(method.tokens_per_forward for method in self.methods if method.is_jacobi)


@dataclass(frozen=True)
class Quality:
    """How good replies are that were decoded with this many tokens per forward."""

    name: str
    label: str
    task: str
    tokens_per_forward: float
    score: float
    interval: Interval | None


@dataclass(frozen=True)
class Widths:
    """A run of ``tune``: fresh guesses -> (width, tokens per forward), by width; of the last batch size."""

    name: str
    points: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Training:
    """``trainer_state.json``: what was logged -> (step, value)."""

    name: str
    curves: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Benchmark:
    """A file of ``scripts/benchmarks``, a run of ``scripts/study.py`` or ``make.json``: its figures as they stand.

    The names of nested ones begin with where they are.
    """

    name: str
    title: str
    figures: dict[str, Any]


@dataclass
class Results:
    """All that a folder holds. ``skipped``: file -> why it is not a result."""

    speeds: list[Speed] = field(default_factory=list)
    qualities: list[Quality] = field(default_factory=list)
    widths: list[Widths] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def read_results(folder: Path) -> Results:
    """Look at every file below ``folder``. Names in the results are paths from there.

    Raises UsageError if it is not a folder or holds no result.
    """
    if not folder.is_dir():
        raise UsageError(f"expected a folder of result files, got {folder}")
    results = Results()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        try:
            _add(results, name, _load(path))
        except UsageError as error:
            results.skipped[name] = str(error)
        else:
            results.files.append(name)
    if not results.files:
        raise UsageError(
            f"no result files in {folder} ({len(results.skipped)} other files); they come from `cllm speedup`, "
            "`cllm acc`, `cllm tune`, `cllm make`, training (trainer_state.json), scripts/benchmarks and scripts/study.py"
        )
    return results


def _load(path: Path) -> Mapping[str, Any]:
    if path.suffix != ".json":
        raise UsageError("not JSON")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError("too large for a result file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError("cannot be read as JSON") from error
    if not isinstance(value, dict):
        raise UsageError("of no known kind")
    return value


def _add(results: Results, name: str, raw: Mapping[str, Any]) -> None:
    reader = next((reader for keys, reader in READERS.items() if set(keys) <= raw.keys()), None)
    if reader is None:
        raise UsageError("of no known kind")
    try:
        reader(results, name, raw)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UsageError(f"looks like a result, but is damaged or of another version ({error!r})") from error


def _add_speed(results: Results, name: str, raw: Mapping[str, Any]) -> None:
    settings, labels = raw["settings"], raw["labels"]
    methods = [
        MethodSpeed(
            label=str(labels[key]),
            tokens_per_forward=float(figures["tokens_per_forward"]),
            tokens_per_forward_interval=_interval(figures["tokens_per_forward_interval"]),
            tokens_per_second=float(figures["tokens_per_second"]),
            speedup=None if figures["speedup"] is None else float(figures["speedup"]),
            speedup_interval=_interval(figures["speedup_interval"]),
            gains=[int(gain) for prompt in raw["prompts"] for gain in prompt["methods"][key].get("accepted") or []],
            is_jacobi=is_jacobi(key),
        )
        for key, figures in raw["methods"].items()
    ]
    model, task = str(settings["test_model"]), str(settings["task"])
    speed = Speed(name, model, task, str(raw["environment"]["device_name"]), int(settings["block_size"]), methods)
    rates = {"jacobi": speed.tokens_per_forward, "target": float(raw["methods"][AR]["tokens_per_forward"])}
    labels = {"jacobi": model, "target": f"{settings.get('target_model')}, AR"}
    qualities = [
        Quality(name, labels[key], task, rates[key], float(figures["score"]), _interval(figures["score_interval"]))
        for key, figures in raw["quality"].items()
        if key in rates and figures["score"] is not None
    ]
    results.speeds.append(speed)
    results.qualities += qualities


def _add_accuracy(results: Results, name: str, raw: Mapping[str, Any]) -> None:
    settings, summary = raw["settings"], raw["summary"]
    score = next(iter(summary["scores"].values()))
    rate = summary["tokens_per_forward"]
    if rate is None:
        raise ValueError("no tokens per forward")
    task, interval = str(settings["task"]), _interval(score["interval"])
    results.qualities.append(Quality(name, str(settings.get("model")), task, float(rate), float(score["mean"]), interval))


def _add_widths(results: Results, name: str, raw: Mapping[str, Any]) -> None:
    points: dict[str, dict[int, float]] = {}
    for choice in raw["choices"]:
        points.setdefault(str(choice["guess"]), {})[int(choice["width"])] = float(choice["tokens_per_forward"])
    results.widths.append(Widths(name, {guess: sorted(found.items()) for guess, found in points.items()}))


def _add_training(results: Results, name: str, raw: Mapping[str, Any]) -> None:
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in raw["log_history"]:
        for key, value in entry.items():
            if key == "loss" or key.endswith("_loss") and key != "train_loss":
                curves.setdefault(key, []).append((int(entry["step"]), float(value)))
    if not curves:
        raise ValueError("no losses")
    results.trainings.append(Training(name, curves))


def _add_benchmark(results: Results, name: str, raw: Mapping[str, Any]) -> None:
    results.benchmarks.append(Benchmark(name, str(raw["benchmark"]), _flat(raw["result"])))


def _add_study(results: Results, name: str, raw: Mapping[str, Any]) -> None:
    measured = {title: figure for title, figure in raw["figures"].items() if figure is not None}
    results.benchmarks.append(Benchmark(name, f"study, {raw['run']}", _flat(measured)))


def _add_made(results: Results, name: str, raw: Mapping[str, Any]) -> None:
    figures = {key: value for key, value in raw.items() if key != "divergences"}
    results.benchmarks.append(Benchmark(name, "cllm make", _flat(figures)))


def _flat(figures: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in figures.items():
        flat |= _flat(value, f"{place}{key}: ") if isinstance(value, Mapping) else {place + key: value}
    return flat


def _interval(value: Any) -> Interval | None:
    return None if value is None else (float(value[0]), float(value[1]))


READERS: dict[tuple[str, ...], Callable[[Results, str, Mapping[str, Any]], None]] = {
    ("methods", "prompts", "quality"): _add_speed,
    ("summary", "settings"): _add_accuracy,
    ("best",): _add_widths,
    ("log_history",): _add_training,
    ("benchmark", "result"): _add_benchmark,
    ("run", "figures"): _add_study,
    ("plan", "stored_width"): _add_made,
}
