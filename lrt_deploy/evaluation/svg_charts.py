"""Charts as SVG text: curves over positions on a logarithmic scale, and a heat map. No library, no script.

Sizes are chosen for a column of 340 to 560 pixels: text stays readable at both ends. Values that are None are gaps.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
_SMALLEST = 1e-12  # where a logarithmic axis ends; zeros are drawn there
_MOST_TICKS, _MOST_DECADES = 6, 16
# From no error to the largest, dark blue to yellow, readable without colour vision too.
_RAMP = ((38, 44, 92), (32, 102, 148), (42, 157, 143), (150, 196, 96), (250, 224, 92))
_MISSING = (190, 30, 30)

Value = float | None


@dataclass(frozen=True)
class Curve:
    """One line of a chart; `begins` is the position of its first value."""

    label: str
    values: Sequence[Value]
    colour: str
    dashed: bool = False
    begins: int = 0


@dataclass(frozen=True)
class _Scale:
    """Positions to x, values to y."""

    positions: int
    low: int  # exponents of ten
    high: int

    def x(self, position: float) -> float:
        """The middle of a position's place."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (position + 0.5) / max(1, self.positions)

    def y(self, value: float) -> float:
        """Clipped to the axis."""
        share = (math.log10(max(value, 10.0**self.low)) - self.low) / max(1, self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(1.0, share)


def curves(lines: Sequence[Curve], limit: float | None = None, divider: int | None = None, label: str = "") -> str:
    """A chart of curves; `limit` is drawn across, `divider` is the position at which something else begins."""
    positions = max((line.begins + len(line.values) for line in lines), default=0)
    known = [value for line in lines for value in line.values if value is not None]
    scale = _scale(positions, [*known, limit] if limit else known)
    parts = [*_axes(scale)]
    if divider is not None and 0 < divider < positions:
        x = (scale.x(divider - 1) + scale.x(divider)) / 2
        parts.append(f'<line class="divider" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
    if limit:
        y = scale.y(limit)
        parts.append(f'<line class="limit" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
    for line in lines:
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts += [f'<path class="curve" d="{d}" stroke="{line.colour}"{dash}/>' for d in _paths(line, scale)]
    return _svg(parts, label)


def heat_map(rows: Sequence[Sequence[Value]], names: Sequence[str], label: str = "") -> tuple[str, str]:
    """Rows of values over positions as colours; returns the chart and a line that says what the colours mean.

    Many positions share a column of the picture, which then shows the largest of them.
    """
    positions = max((len(row) for row in rows), default=0)
    known = [value for row in rows for value in row if value is not None]
    scale = _scale(positions, known)
    pixels = [[_colour(value, scale) for value in _columns(row, WIDTH - LEFT - RIGHT)] for row in rows]
    step = (HEIGHT - BOTTOM - TOP) / max(1, len(rows))
    parts = [
        f'<image x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - BOTTOM - TOP}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" href="{_png(pixels)}"/>'
    ]
    every = math.ceil(len(rows) / 14)
    for index, name in enumerate(names):
        if index % every == 0:
            y = TOP + step * (index + 0.5) + 4
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{escape(name)}</text>')
    parts += _position_ticks(scale)
    meaning = f"dark: {10.0**scale.low:.0e} or less, yellow: {10.0**scale.high:.0e}, red: missing or not finite"
    return _svg(parts, label), meaning


def _scale(positions: int, values: Sequence[Value]) -> _Scale:
    positive = [math.log10(max(value, _SMALLEST)) for value in values if value]
    if not positive:
        return _Scale(positions, -8, -4)
    high = math.ceil(max(positive) + 1e-9)
    low = max(math.floor(min(positive)), high - _MOST_DECADES)
    return _Scale(positions, min(low, high - 1), high)


def _axes(scale: _Scale) -> Iterator[str]:
    decades = range(scale.low, scale.high + 1, max(1, math.ceil((scale.high - scale.low) / _MOST_TICKS)))
    for exponent in decades:
        y = scale.y(10.0**exponent)
        yield f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">1e{exponent}</text>'
    yield from _position_ticks(scale)


def _position_ticks(scale: _Scale) -> Iterator[str]:
    y = HEIGHT - BOTTOM + 16
    for position in range(0, scale.positions, _round_step(scale.positions)):
        yield f'<text class="tick" x="{scale.x(position):.1f}" y="{y}" text-anchor="middle">{position}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="axis" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">position</text>'


def _round_step(count: int) -> int:
    """1, 2 or 5 times a power of ten, so that at most six ticks fit."""
    step = 1
    while count > _MOST_TICKS * step:
        step = step * 5 // 2 if str(step).startswith("2") else step * 2
    return step


def _paths(line: Curve, scale: _Scale) -> Iterator[str]:
    """One path for each run of values without a gap; a lone value is a short stroke."""
    run: list[str] = []
    for index, value in enumerate([*line.values, None]):
        if value is not None:
            run.append(f"{scale.x(line.begins + index):.1f} {scale.y(value):.1f}")
        elif run:
            yield "M" + "L".join(run if len(run) > 1 else [run[0], run[0]])
            run = []


def _columns(row: Sequence[Value], most: int) -> Iterator[Value]:
    """At most `most` values: the largest of each group, None if one is missing."""
    count = min(len(row), most)
    for i in range(count):
        group = row[i * len(row) // count : (i + 1) * len(row) // count]
        yield None if None in group else max(value for value in group if value is not None)


def _colour(value: Value, scale: _Scale) -> tuple[int, int, int]:
    if value is None:
        return _MISSING
    share = (math.log10(max(value, 10.0**scale.low)) - scale.low) / (scale.high - scale.low)
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    mix = place - index
    red, green, blue = (round(a + (b - a) * mix) for a, b in zip(_RAMP[index], _RAMP[index + 1], strict=True))
    return red, green, blue


def _png(rows: Sequence[Sequence[tuple[int, int, int]]]) -> str:
    """A picture of these colours as a data address."""
    width = max((len(row) for row in rows), default=0)
    if not width:
        return "data:,"
    raw = b"".join(b"\0" + bytes(channel for pixel in row for channel in pixel) for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, len(rows), 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _svg(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
