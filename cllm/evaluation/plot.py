"""Figures of results, with matplotlib (extra ``plot``). Each function draws on axes that it is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from cllm.errors import UsageError
from cllm.evaluation.interval import Interval
from cllm.evaluation.results import Quality, Results, Speed, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:cyan")
DPI = 110
TPF = "tokens per forward"


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)) -> tuple[Figure, list[Axes]]:
    """Raises UsageError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install -e .[plot]") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def png(figure: Figure) -> bytes:
    data = BytesIO()
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    return data.getvalue()


# ------------------------------------------------------------ figures of a report


def speedup(results: Results) -> Figure | None:
    """Speedup over AR, and tokens per forward, by task, model and method: the paper's figure."""
    if not results.speeds:
        return None
    figure, (left, right) = new_figure(1, 2, size=(11, 1.6 + 0.5 * sum(len(speed.methods) for speed in results.speeds)))
    for axes, title in ((left, "speedup over AR (tokens/s)"), (right, TPF)):
        axes.set(title=title)
        axes.margins(x=0.15)
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    methods = sorted((method for speed in results.speeds for method in speed.methods), key=lambda method: method.is_jacobi)
    names = dict.fromkeys(method.label for method in methods)  # baselines first: AR is grey
    colours = {name: colour(index) for index, name in enumerate(names)}
    places, labels, at = [], [], 0.0
    for speed in results.speeds:
        first = at
        for method in speed.methods:
            look: Any = {"color": colours[method.label], "label": method.label}
            if method.speedup is not None:
                _bar(left, at, method.speedup, method.speedup_interval, look)
            _bar(right, at, method.tokens_per_forward, method.tokens_per_forward_interval, look)
            at += 1
        places.append((first + at - 1) / 2)
        labels.append(f"{speed.task}\n{speed.model}")
        at += 0.6
    left.set_yticks(places, labels)
    right.set_yticks(places, [""] * len(places))
    for axes in (left, right):
        axes.invert_yaxis()
    _legend(figure, right)
    return figure


def accuracy(results: Results) -> Figure | None:
    """TPF against accuracy: never one without the other."""
    if not results.qualities:
        return None
    figure, (axes,) = new_figure()
    for index, quality in enumerate(results.qualities):
        _quality(axes, quality, colour(index))
    axes.set(xlabel=TPF, ylabel="score", title="Tokens per forward against accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure


def width(results: Results) -> Figure | None:
    """TPF against width: lines from `tune`, marks from runs of `speedup`."""
    if not (results.widths or results.speeds):
        return None
    figure, (axes,) = new_figure()
    lines = [(f"{run.name}, {guess}", points) for run in results.widths for guess, points in run.points.items()]
    lines += [(f"{task}, {model}", points) for (task, model), points in _by_width(results.speeds).items()]
    for index, (label, points) in enumerate(lines):
        axes.plot(*zip(*points), marker="o", color=colour(index), label=label)
    axes.set(xlabel="width (block size)", ylabel=TPF, title="Tokens per forward against width")
    axes.set_xticks(sorted({at for _, points in lines for at, _ in points}))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def training(results: Results) -> Figure | None:
    """Losses by step, a panel for each run."""
    if not results.trainings:
        return None
    count = len(results.trainings)
    figure, panels = new_figure(count, 1, size=(7, 1 + 2.6 * count))
    for axes, run in zip(panels, results.trainings):
        _training(axes, run)
    return figure


def accepted(results: Results) -> Figure | None:
    """How many tokens the forwards of each run gained."""
    runs = {
        f"{speed.model}, {method.label}": method.gains
        for speed in results.speeds
        for method in speed.methods
        if method.is_jacobi and method.gains
    }
    if not runs:
        return None
    figure, (axes,) = new_figure()
    histogram(axes, runs)
    axes.set(title="Tokens accepted in one forward")
    return figure


FIGURES: dict[str, tuple[str, Callable[[Results], Figure | None]]] = {
    "speedup": ("Speedup by task and method", speedup),
    "accuracy": ("Tokens per forward against accuracy", accuracy),
    "width": ("Tokens per forward against width", width),
    "training": ("Training curves", training),
    "accepted": ("Accepted tokens", accepted),
}


# ------------------------------------------------------------ their parts


def histogram(axes: Axes, gains: Mapping[str, Sequence[int]]) -> None:
    """Bars side by side: the share of forwards that gained 1, 2, ... tokens, for each name."""
    most, bar = max(max(each) for each in gains.values()), 0.8 / len(gains)
    for index, (name, own) in enumerate(gains.items()):
        counts = Counter(own)
        places = [n + (index - (len(gains) - 1) / 2) * bar for n in range(1, most + 1)]
        shares = [counts[n] / len(own) for n in range(1, most + 1)]
        axes.bar(places, shares, width=bar, color=colour(index), label=name)
    axes.set(xlabel="tokens accepted in one forward", ylabel="share of forwards", xticks=range(1, most + 1))
    axes.legend(fontsize="small")


def log_ticks(axis: Axis) -> None:
    """Plain numbers, 1, 2, 5, 10, ..., on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _bar(axes: Axes, at: float, value: float, interval: Interval | None, look: dict[str, Any]) -> None:
    error = [[value - interval[0]], [interval[1] - value]] if interval else None
    axes.barh(at, value, xerr=error, height=0.9, error_kw={"linewidth": 1}, **look)
    axes.text((interval or (0, value))[1], at, f" {value:.2f}", va="center", fontsize="small")


def _quality(axes: Axes, found: Quality, shade: str) -> None:
    error = [[found.score - found.interval[0]], [found.interval[1] - found.score]] if found.interval else None
    label = f"{found.task}: {found.label} ({found.name})"
    axes.errorbar(found.tokens_per_forward, found.score, yerr=error, fmt="o", capsize=3, color=shade, label=label)


def _by_width(speeds: Sequence[Speed]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for speed in speeds:
        points.setdefault((speed.task, speed.model), []).append((speed.width, speed.tokens_per_forward))
    return {key: sorted(each) for key, each in points.items()}


def _training(axes: Axes, run: Training) -> None:
    for index, (name, points) in enumerate(run.curves.items()):
        axes.plot(*zip(*points), marker=".", color=colour(index), label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss", title=run.name, yscale="log")
    log_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _legend(figure: Figure, axes: Axes) -> None:
    """Below everything, one entry for each label of ``axes``."""
    handles, labels = axes.get_legend_handles_labels()
    one = dict(zip(labels, handles))
    figure.legend(list(one.values()), list(one), fontsize="small", loc="outside lower center", ncols=3)
