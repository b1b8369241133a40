"""Curves as small inline SVG in the colours of the page, so that they follow its dark mode and fetch nothing."""

import math
from collections.abc import Sequence
from html import escape

from lowrank_rlhf.plots import Curve

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 24
COLORS = ("#6366f1", "#ea7317", "#16a37b", "#c04bd6", "#c79a1b", "#e0475b", "#2596be", "#7d8597")
MAX_POINTS = 600  # drawn of a curve; of a longer one every n-th


def chart(title: str, unit: str, curves: dict[str, Curve]) -> str:
    """One figure with its legend: steps to the right, values upward; a value that is nan leaves a gap."""
    steps = [step for curve in curves.values() for step in curve[0]]
    values = [value for curve in curves.values() for value in curve[1] if math.isfinite(value)]
    across, up = ticks(min(steps), max(steps)), ticks(min(values), max(values))
    left, right = min(*across, min(steps)), max(*across, max(steps))
    low, high = min(*up, min(values)), max(*up, max(values))

    def x(step: float) -> float:
        return round(LEFT + (step - left) / (right - left or 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low or 1) * (HEIGHT - TOP - BOTTOM), 1)

    grid = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v)}" y2="{y(v)}"/>'
        f'<text x="{LEFT - 6}" y="{y(v) + 3.5}" text-anchor="end">{number(v)}</text>'
        for v in up
    ]
    grid += [f'<text x="{x(s)}" y="{HEIGHT - 6}" text-anchor="middle">{number(s)}</text>' for s in across]
    drawn, legend = [], []
    for index, (name, (at, shown)) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        every = max(1, math.ceil(len(at) / MAX_POINTS))
        points = [(x(s), y(v)) if math.isfinite(v) else None for s, v in zip(at, shown, strict=True)]
        drawn.append(_curve(points[::every] + points[-1:] * (every > 1), color, dots=len(points) <= 40))
        last = next(v for v in reversed(shown) if math.isfinite(v))
        legend.append(f'<li><i style="background:{color}"></i>{escape(name)} <b>{number(last)}</b></li>')
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <span>{escape(unit)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step">{"".join(grid)}'
        f"{''.join(drawn)}</svg><ul>{''.join(legend)}</ul></figure>"
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round numbers within a range; at least one.

    >>> ticks(0, 34), ticks(0.12, 0.31), ticks(5, 5)
    ([0, 10, 20, 30], [0.15, 0.2, 0.25, 0.3], [5])
    """
    if not high > low:
        return [low]
    for exponent in range(math.floor(math.log10(high - low)) - 1, 310):
        for digit in (1, 2, 5):
            step = digit * 10.0**exponent
            first, last = math.ceil(low / step), math.floor(high / step)
            if 0 <= last - first < most:
                return [_tidy(n * step) for n in range(first, last + 1)]
    return [low]


def number(value: float) -> str:
    """A figure in at most four digits.

    >>> number(0.31728), number(12345.6), number(3.0), number(float("nan")), number(2e-5)
    ('0.317', '12346', '3', 'nan', '2e-05')
    """
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _tidy(value: float) -> float:
    rounded = float(f"{value:.10g}")
    return int(rounded) if rounded.is_integer() else rounded


def _curve(points: Sequence[tuple[float, float] | None], color: str, *, dots: bool) -> str:
    """A line broken at gaps; single points between two gaps are dots."""
    lines, line = [], []
    for point in [*points, None]:
        if point is not None:
            line.append(point)
            continue
        if len(line) > 1:
            lines.append(" ".join(f"{x},{y}" for x, y in line))
        elif line:
            lines.append(" ".join([f"{x},{y}" for x, y in line] * 2))
        line = []
    parts = [
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.8" stroke-linejoin="round" '
        'stroke-linecap="round"/>'
        for line in lines
    ]
    if dots:
        parts += [f'<circle cx="{p[0]}" cy="{p[1]}" r="2" fill="{color}"/>' for p in points if p is not None]
    return "".join(parts)
