"""The one template of every HTML page that aprlab writes: whole, nothing fetched, fit for narrow windows and paper."""

from __future__ import annotations

import html

REPORT_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:52em;margin:2em auto;padding:0 1em;color:#222;background:#fff}
section{border-left:.3em solid #0072b2;padding:.1em 1em;margin:1.6em 0;break-inside:avoid}
section.no{border-color:#d55e00}h1{line-height:1.2}h2{font-size:1.15em;margin:.2em 0}ul{margin:.3em 0;padding-left:1.2em}
p{margin:.4em 0}b{color:#d55e00}code{overflow-wrap:anywhere}img{max-width:100%;height:auto;display:block;margin:.6em 0}
pre{background:#f4f4f4;padding:.6em;overflow-x:auto;font-size:.8em}summary{cursor:pointer}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9em}th,td{border-bottom:1px solid #ccc;padding:.25em .7em;
text-align:left;vertical-align:top}tr.no td:first-child{border-left:.3em solid #d55e00}
tr.yes td:first-child{border-left:.3em solid #0072b2}
@media print{body{margin:0;max-width:none}a{color:inherit}pre{white-space:pre-wrap}img{max-height:9cm;width:auto}}
"""


def page(title: str, *parts: str, style: str = REPORT_STYLE) -> str:
    """One HTML page.

    Args:
        title: text of the window's title; escaped here.
        parts: the body, HTML already, a line or more each.
        style: its CSS.
    """
    head = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>"""
    return "\n".join([head, *parts, "</body></html>\n"])


__all__ = ["REPORT_STYLE", "page"]
