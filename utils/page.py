"""HTML pages of one file each (page.html), images and charts and all, that ask nothing of the network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.errors import printable


class Line(NamedTuple):
    """One line of a chart; what is not finite is left out."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    colour: str  # as CSS has it
    width: float = 1.6
    shown: bool = True  # in the legend


def fill_page(title: str, body: str) -> str:
    """Returns a page; `body` is HTML."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("{{title}}", escape(printable(title))).replace("{{body}}", body)


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """Returns rows of text as a table, the first as its heading."""
    lines = [
        "".join(f"<{tag}>{escape(printable(cell))}</{tag}>" for cell in row)
        for row, tag in ((row, "td" if index else "th") for index, row in enumerate(rows))
    ]
    return f'<div class="scroll"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def image_tag(image: np.ndarray, alt: str) -> str:
    """Returns an image, uint8 (h, w, 3) BGR, as an <img> that holds it as a JPEG; `alt` says what it shows."""
    _, data = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, 80))
    content, (height, width) = base64.b64encode(data.tobytes()).decode(), image.shape[:2]
    name = escape(printable(alt))
    return f'<img src="data:image/jpeg;base64,{content}" width="{width}" height="{height}" alt="{name}">'


def columns_chart(title: str, counts: Sequence[int], axis: Sequence[str]) -> str:
    """Returns counts as columns; `axis` are the marks below them."""
    top = max(max(counts), 1)
    bars = "".join(f'<i style="height:{100 * count / top:.1f}%" title="{count}"></i>' for count in counts)
    marks = "".join(f"<span>{escape(text)}</span>" for text in axis)
    return f'<div><h3>{title}</h3><div class="columns">{bars}</div><div class="axis">{marks}</div></div>'


def density_chart(title: str, grid: np.ndarray, axis: Sequence[str], more: str = "") -> str:
    """Returns a square picture of counts (rows, columns)."""
    side, top = len(grid), max(grid.max(), 1)
    cells = "".join(
        f'<rect x="{x}" y="{y}" width="1.02" height="1.02" opacity="{(grid[y, x] / top) ** 0.5:.2f}"/>'
        for y, x in np.argwhere(grid)
    )
    marks = "".join(f"<span>{escape(text)}</span>" for text in axis)
    svg = f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{title}">{cells}{more}</svg>'
    return f'<div><h3>{title}</h3>{svg}<div class="axis" style="max-width:22rem">{marks}</div></div>'


def line_chart(title: str, lines: Sequence[Line], x_name: str, unit: bool = False) -> str:
    """Returns lines over one axis with a legend; `unit` for figures from 0 to 1."""
    left, top, width, height = 54, 8, 258, 150
    points = [np.column_stack((line.x, line.y)).astype(float) for line in lines]
    points = [some[np.isfinite(some).all(1)] for some in points]
    everything = np.concatenate([*points, np.zeros((0, 2))])
    lows, highs = (0.0, 0.0), (1.0, 1.0)
    if len(everything) and not unit:
        lows, highs = everything.min(0), everything.max(0)
    spans = [high - low or 1.0 for low, high in zip(lows, highs, strict=True)]

    def place(some: np.ndarray) -> np.ndarray:
        return (some - lows) / spans * (width, -height) + (left, top + height)

    drawn = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + share * width, top + height - share * height
        drawn.append(f'<path class="grid" d="M{left} {y:g}h{width}"/>')
        drawn.append(f'<text x="{left - 5}" y="{y + 4:g}" text-anchor="end">{lows[1] + share * spans[1]:.3g}</text>')
        if share in (0, 0.5, 1):
            drawn.append(
                f'<text x="{x:g}" y="{top + height + 15}" text-anchor="middle">{lows[0] + share * spans[0]:.3g}</text>'
            )
    for line, some in zip(lines, points, strict=True):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in place(some))
        if len(some) == 1:
            path += "h.1"  # a single epoch is a dot
        if path:
            colour, name = escape(line.colour), escape(printable(line.label))
            drawn.append(
                f'<path d="M{path}" style="stroke:{colour}" stroke-width="{line.width}"><title>{name}</title></path>'
            )
    drawn.append(f'<text x="{left + width / 2}" y="{top + height + 30}" text-anchor="middle">{escape(x_name)}</text>')
    legend = "".join(
        f'<span><i style="background:{escape(line.colour)}"></i>{escape(printable(line.label))}</span>'
        for line in lines
        if line.shown
    )
    svg = f'<svg class="plot" viewBox="0 0 320 195" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    return f'<div><h3>{escape(title)}</h3><div class="legend">{legend}</div>{svg}</div>'
