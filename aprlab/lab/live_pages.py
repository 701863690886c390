"""Figures in exported pages: the picture, its data for hover and zoom, and the one script that makes them live.

The script is that of aprlab's JupyterLab extension; it goes into the page whole, once, so that nothing is fetched. Without
scripts, and on paper, the picture is what there is.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aprlab.display.figure_data import FIGURE_DATA

_SCRIPT = Path(__file__).resolve().parents[1] / "widgets" / "jupyter" / "labextensions" / "aprlab" / "static" / "live.js"


def figure_html(output: Mapping[str, Any], *, live: bool = True) -> str:
    """A picture of a cell, with its data where it has any.

    Args:
        output: of a notebook, with ``image/png`` in its data.
        live: with its data; a page that goes to strangers has no script, and needs none.
    """
    data, size = output["data"], output.get("metadata", {}).get("image/png", {})
    sides = "".join(f' {side}="{size[side]}"' for side in ("width", "height") if isinstance(size.get(side), int))
    png = html.escape("".join("".join(data["image/png"]).split()))
    picture = f'<img alt="{html.escape(alt_text("".join(data.get("text/plain", ""))))}"{sides} src="data:image/png;base64,{png}">'
    drawn = data.get(FIGURE_DATA) if live else None
    block = f'<script type="application/json" class="aprlab-figure">{_json(drawn)}</script>' if isinstance(drawn, Mapping) else ""
    return f'<div class="jp-RenderedImage jp-OutputArea-output">{picture}{block}</div>'


def alt_text(words: str) -> str:
    """What a figure shows, in a line: the titles of its axes, or its labels where they have none."""
    heads = re.findall(r"^ {2}\d+\. (.*)$", words, flags=re.M)
    named = " ".join(re.split(r", [xy] ", head)[0] for head in heads)
    titles = [title for _, title in re.findall(r"(['\"])(.+?)\1", named)]
    return f"Figure: {'; '.join(titles or [head.strip(chr(39)) for head in heads][:3]) or 'without a title'}."


def _json(value: Any) -> str:
    """JSON that ends no script and begins no comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def with_script(page: str) -> str:
    """A page whose figures are live; as it is where it has none with data."""
    if 'class="aprlab-figure"' not in page:
        return page
    script = f"<script>\n{_SCRIPT.read_text(encoding='utf-8')}aprlabLive.page();\n</script>"
    before, after = page.rsplit("</body>", 1)
    return f"{before}{script}</body>{after}"


__all__ = ["alt_text", "figure_html", "with_script"]
