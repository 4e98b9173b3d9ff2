"""The page at `/`: one file without outside resources, filled with the model's settings, and its security policy."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PAGE_FILE = Path(__file__).with_name("page.html")
SETTINGS_MARK, TITLE_MARK = "{{settings}}", "{{model}}"


class Page(NamedTuple):
    """A page and its Content-Security-Policy."""

    html: str
    policy: str


def build_page(model: str, settings: Mapping[str, Any]) -> Page:
    """Fills the page.

    Args:
        model: the model's name.
        settings: what the page's script reads, as JSON.
    """
    text = json.dumps({"model": model, **settings}).replace("<", "\\u003c")  # must not end its element
    filled = PAGE_FILE.read_text(encoding="utf-8").replace(SETTINGS_MARK, text)
    filled = filled.replace(TITLE_MARK, html.escape(model))
    policy = {
        "default-src": "'none'",
        "style-src": _hash_of("style", filled),
        "script-src": _hash_of("script", filled),
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return Page(filled, "; ".join(f"{name} {value}" for name, value in policy.items()))


def _hash_of(element: str, page: str) -> str:
    """Returns the policy's source for the one element without attributes of this name: the hash of its content."""
    content = re.search(rf"<{element}>(.*?)</{element}>", page, re.S)[1]
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
