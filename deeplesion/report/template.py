"""Pages from templates, and data within them."""

from __future__ import annotations

import json
import re


def fill(template: str, **parts: str) -> str:
    """The template with each {{name}} replaced; what is put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def script_json(content: object) -> str:
    """JSON that may stand in a <script>: no tag begins in it."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c")
