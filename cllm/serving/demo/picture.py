"""A race as an animated SVG without scripts, so that it also plays in a README."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

from cllm.serving.demo.race import Kind, Method, Step

COLUMNS, LINES = 46, 16  # characters per line and lines of a panel; of a longer text, the last lines are shown
CHARACTER, LINE, MARGIN, HEAD = 8.43, 20, 16, 92  # pixels, for a 14-pixel monospaced font
LONGEST, REST = 12.0, 3.0  # the longest animation in seconds, and how long its end is shown
TITLES: dict[Method, str] = {"ar": "AR: one token per forward", "jacobi": "Jacobi: the same text"}
STYLE = """
  text { font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #1b1f24; white-space: pre }
  .page { fill: #ffffff } .panel { fill: #f4f5f7 } .title { font-weight: bold }
  .fast { fill: #b8e6c3 } .stationary { fill: #ffd98a }
  @media (prefers-color-scheme: dark) {
    text { fill: #e8eaed } .page { fill: #0d1117 } .panel { fill: #1a1f27 }
    .fast { fill: #1f5c33 } .stationary { fill: #75540c }
  }
"""


@dataclass(frozen=True)
class Fragment:
    """A piece of a line, its place, and the index of the step that verified it."""

    line: int
    column: int
    text: str
    kind: str
    step: int


def animate(steps: Sequence[Step], prompt: str, model: str) -> str:
    """The SVG of a finished race. Both methods play at their own speed, or sped up by the same factor."""
    slowest = max(step.seconds for step in steps)
    shown = min(slowest, LONGEST)
    clock = Clock(shown / slowest if slowest else 1.0, shown + REST)
    own = {method: [step for step in steps if step.method == method] for method in TITLES}
    lines = 1 + max((piece.line for each in own.values() for piece in fragments(each)), default=0)
    width, height = 3 * MARGIN + 2 * _panel_width(), HEAD + lines * LINE + 2 * MARGIN + 28
    body = [f'<rect class="page" width="{width:.0f}" height="{height}"/>', _text(MARGIN, 26, model, "title")]
    question = " ".join(prompt.split())
    fitting = int((width - 2 * MARGIN) / CHARACTER)
    body.append(_text(MARGIN, 50, question if len(question) <= fitting else "…" + question[1 - fitting :]))
    for index, (method, each) in enumerate(own.items()):
        body += _panel(TITLES[method], each, MARGIN + index * (_panel_width() + MARGIN), lines, clock)
    body.append(_text(MARGIN, height - 12, _legend(clock.scale, {token.kind for step in steps for token in step.gained})))
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    label = escape(f"AR and Jacobi decoding by {model}, side by side")
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}"><style>{STYLE}</style>' + "\n".join(
        [*body, "</svg>\n"]
    )


@dataclass(frozen=True)
class Clock:
    """Converts seconds of decoding to those of the animation, which repeats every ``cycle`` seconds."""

    scale: float
    cycle: float

    def visible(self, start: float, end: float | None = None) -> str:
        """An SVG element that shows its parent from ``start`` to ``end``, by default the end of the cycle."""
        begin = max(1e-4, start * self.scale / self.cycle)
        times, values = [0.0, begin], [0, 1]
        if end is not None:
            times, values = [*times, max(begin, end * self.scale / self.cycle)], [*values, 0]
        key_times, key_values = ";".join(f"{time:.4f}" for time in times), ";".join(map(str, values))
        return (
            f'<animate attributeName="opacity" calcMode="discrete" dur="{self.cycle:.2f}s" repeatCount="indefinite" '
            f'keyTimes="{key_times}" values="{key_values}"/>'
        )


def fragments(steps: Sequence[Step]) -> list[Fragment]:
    """The text wrapped to COLUMNS characters, of which the last LINES lines are kept."""
    found: list[Fragment] = []
    line = column = 0
    for number, step in enumerate(steps):
        for token in step.gained:
            for index, part in enumerate(token.text.split("\n")):
                if index:
                    line, column = line + 1, 0
                while part:
                    if column == COLUMNS:
                        line, column = line + 1, 0
                    piece, part = part[: COLUMNS - column], part[COLUMNS - column :]
                    found.append(Fragment(line, column, piece, token.kind, number))
                    column += len(piece)
    first = max(0, line + 1 - LINES)
    return [Fragment(f.line - first, f.column, f.text, f.kind, f.step) for f in found if f.line >= first]


def _panel(title: str, steps: Sequence[Step], x: float, lines: int, clock: Clock) -> list[str]:
    box = f'<rect class="panel" x="{x:.1f}" y="{HEAD - 26}" width="{_panel_width():.1f}" height="{lines * LINE + 42}" rx="6"/>'
    left = x + MARGIN / 2
    drawn = [box, _text(left, HEAD - 8, title, "title")]
    pieces = fragments(steps)
    for number, step in enumerate(steps):
        end = steps[number + 1].seconds if number + 1 < len(steps) else None
        speed = f"{step.generated / step.forward:.2f} per forward, {step.generated / step.seconds:.1f}/s"
        right = left + (COLUMNS - len(speed)) * CHARACTER
        drawn.append(f'<g opacity="0">{clock.visible(step.seconds, end)}{_text(right, HEAD + lines * LINE + 8, speed)}</g>')
        own = "".join(_fragment(piece, left) for piece in pieces if piece.step == number)
        drawn.append(f'<g opacity="0">{clock.visible(step.seconds)}{own}</g>')
    return drawn


def _fragment(piece: Fragment, left: float) -> str:
    x, y = left + piece.column * CHARACTER, HEAD + 16 + piece.line * LINE
    mark = f'<rect class="{piece.kind}" x="{x:.1f}" y="{y - 14}" width="{len(piece.text) * CHARACTER:.1f}" height="18"/>'
    return (mark if piece.kind != "plain" else "") + _text(x, y, piece.text, length=len(piece.text) * CHARACTER)


def _text(x: float, y: float, content: str, kind: str = "", length: float | None = None) -> str:
    fitted = f' textLength="{length:.1f}"' if length else ""
    shown = "".join(letter if letter.isprintable() else " " for letter in content)
    return f'<text x="{x:.1f}" y="{y}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}{fitted}>{escape(shown)}</text>'


def _panel_width() -> float:
    return COLUMNS * CHARACTER + MARGIN


def _legend(scale: float, kinds: Collection[Kind]) -> str:
    colours = ["green: guessed right (fast-forwarded)"]
    if "stationary" in kinds:
        colours.append("amber: right one forward earlier (stationary)")
    if scale != 1:
        colours.append(f"shown {1 / scale:.1f} times faster than it ran")
    return "; ".join(colours)
