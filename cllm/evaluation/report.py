"""One self-contained HTML page of results."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from cllm.evaluation import plot
from cllm.evaluation.results import Benchmark, Results
from cllm.evaluation.table import number, percent_with_interval, with_interval
from cllm.files import write_text

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; background: white; border-radius: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; text-align: left; border-bottom: 1px solid #8884; }
"""


def write_report(results: Results, path: Path, title: str) -> list[Path]:
    """Write the page, and beside it a picture ``STEM-NAME.png`` for each figure there is data for. Returns all files.

    Raises UsageError where matplotlib is missing or the page cannot be written, OSError where a picture cannot.
    """
    figures = {name: draw(results) for name, (_, draw) in plot.FIGURES.items()}
    pictures = {name: plot.png(figure) for name, figure in figures.items() if figure is not None}
    write_text(path, page(results, pictures, title))
    files = {name: path.with_name(f"{path.stem}-{name}.png") for name in pictures}
    for name, file in files.items():
        file.write_bytes(pictures[name])
    return [path, *files.values()]


def page(results: Results, pictures: Mapping[str, bytes], title: str) -> str:
    """The page as text, with the ``pictures`` (name of the figure -> PNG) inside."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for name, picture in pictures.items():
        heading = plot.FIGURES[name][0]
        data = base64.b64encode(picture).decode()
        parts += [f"<h2>{escape(heading)}</h2>", f'<img alt="{escape(heading)}" src="data:image/png;base64,{data}">']
        parts += [_speed_table(results)] if name == "speedup" else []
        parts += [_quality_table(results)] if name == "accuracy" else []
    for benchmark in results.benchmarks:
        parts += [f"<h2>Benchmark: {escape(benchmark.title)}</h2>", _benchmark_table(benchmark)]
    parts += ["<h2>Files</h2>", _table(("file", ""), _files(results))]
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _speed_table(results: Results) -> str:
    rows = [
        (
            speed.task,
            speed.model,
            method.label,
            with_interval(method.tokens_per_forward, method.tokens_per_forward_interval),
            number(method.tokens_per_second, 1),
            with_interval(method.speedup, method.speedup_interval),
            speed.device,
            speed.name,
        )
        for speed in results.speeds
        for method in speed.methods
    ]
    return _table(("task", "model", "method", plot.TPF, "tokens/s", "speedup over AR", "device", "file"), rows)


def _quality_table(results: Results) -> str:
    rows = [
        (each.task, each.label, number(each.tokens_per_forward), percent_with_interval(each.score, each.interval), each.name)
        for each in results.qualities
    ]
    return _table(("task", "model", plot.TPF, "score", "file"), rows)


def _benchmark_table(benchmark: Benchmark) -> str:
    rows = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in benchmark.figures.items()]
    return _table((benchmark.name, ""), rows)


def _files(results: Results) -> Iterable[tuple[str, str]]:
    yield from ((name, "read") for name in results.files)
    yield from ((name, f"skipped: {why}") for name, why in results.skipped.items())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(header, "th"), *(row(cells, "td") for cells in rows)]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
