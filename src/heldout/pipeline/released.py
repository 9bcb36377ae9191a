"""How a report tells that its models were released although the verdict is not `ship`.

Added to the finished report: what it was made from is gone, and a release decides nothing that it measured.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from heldout.pipeline.findings import markdown_text


def to_json(report: str, release: dict[str, Any]) -> str:
    """`report.json` with one more key."""
    return json.dumps(json.loads(report) | {"release": release}, indent=2, ensure_ascii=False) + "\n"


def to_markdown(report: str, release: dict[str, Any]) -> str:
    """`report.md` with a line below its headline."""
    headline, _, rest = report.partition("\n")
    return f"{headline}\n\n**{_released(release)}:** {markdown_text(release['reason'])}\n{rest}"


def to_html(report: str, release: dict[str, Any]) -> str:
    """`report.html` with a paragraph below its headline."""
    head, headline_ends, rest = report.partition("</h1>")
    note = f'\n<p class="release"><b>{_released(release)}:</b> {html.escape(release["reason"])}</p>'
    return f"{head}{headline_ends}{note}{rest}"


def _released(release: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(release["released_at"], timezone.utc)
    return f"Released all the same on {when:%Y-%m-%d %H:%M} UTC"


#: By the name that a job's result file has.
ADD_TO: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "report.json": to_json,
    "report.md": to_markdown,
    "report.html": to_html,
}
