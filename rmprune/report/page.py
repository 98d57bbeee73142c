"""The page of a report: one file that asks for nothing, with the data as JSON, our script, and Observable Plot, which draws."""

import base64
import hashlib
import html
import json
import math
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "page.js")


def page(payload: dict[str, Any]) -> str:
    """The page as HTML text; `payload` is what payload.py makes of records.

    Nothing of a record becomes markup: all of it stands in a JSON block without `<`, which the script writes as text.
    The page's policy forbids every request, and every script but the ones here.
    """
    scripts = [(_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return _fill(
        (_HERE / "page.html").read_text(encoding="utf-8"),
        title=html.escape(", ".join(payload["groups"])),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {digests}; base-uri 'none'; form-action 'none'",
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        data=json.dumps(_finite(payload), separators=(",", ":")).replace("<", "\\u003c"),
        licences=(_HERE / "vendor/LICENSES.txt").read_text(encoding="utf-8"),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _finite(value: Any) -> Any:
    """JSON without the numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fill(template: str, **parts: str) -> str:
    """`template` with `{{name}}` replaced by each part, in one go: what a part holds is not looked at again."""
    pieces = template.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
