"""The tools' HTML pages: one file each (page.html), images and all, that asks nothing of the network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np

from utils.errors import printable


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
