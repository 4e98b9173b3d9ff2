"""The page for people (page.html): an image is chosen, its boxes appear. One file, nothing asked of other sites.

serve.py's page sends images to the service; the one of `export.py --include web` detects in the browser.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from utils.plots.boxes import PALETTE

PAGE_FILE = Path(__file__).with_name("page.html")


def build_page(settings: dict[str, Any]) -> tuple[str, str]:
    """Fills the page; returns it and its Content-Security-Policy.

    Args:
        settings: what the page's script reads, as JSON: `model` (its name), `conf` (where the slider stands),
            `lowestConf`; `route` and `maxBytes` of a service, or `worker`, the script that detects here.
    """
    text = json.dumps({**settings, "palette": PALETTE}).replace("<", "\\u003c")  # must not end its element
    page = PAGE_FILE.read_text(encoding="utf-8").replace("{{settings}}", text)
    page = page.replace("{{model}}", html.escape(settings["model"]))

    sources = f"style-src {hash_of(page, 'style')}; script-src {hash_of(page, 'script')}; worker-src 'self'"
    policy = f"default-src 'none'; {sources}"
    return page, f"{policy}; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'"


def hash_of(page: str, element: str) -> str:
    """Returns the hash, as policies have it, of the content of the one element without attributes of this name."""
    content = re.search(rf"<{element}>(.*?)</{element}>", page, re.S)[1]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode('utf-8')).digest()).decode('ascii')}'"
