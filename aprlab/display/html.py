"""How models, traces, comparisons, verdicts and gates look in a notebook: one table, one kind of mark, no scripts.

Everything is a self-contained string of HTML: colours come from JupyterLab's theme where there is one, and no
state is shown by colour alone.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import AprlabError

# tone -> sign in front, colour (with the light theme's where no theme is set); the signs make colours a second language
_TONES = {
    "good": ("✓", "var(--jp-success-color1, #00735c)"),
    "bad": ("✗", "var(--jp-error-color1, #b3400a)"),
    "open": ("?", "var(--jp-warn-color1, #8a5a00)"),
    "mild": ("", "var(--jp-ui-font-color2, #666)"),
    "": ("", "inherit"),
}


@dataclass(frozen=True)
class Cell:
    """A text in a tone: ``good``, ``bad``, ``open`` (cannot be said), ``mild`` (not the point)."""

    text: str
    tone: str = ""

    def html(self) -> str:
        """Sign and text, escaped."""
        sign, colour = _TONES[self.tone]
        inside = f"{sign} {html.escape(self.text)}".strip()
        return f'<span style="color:{colour}">{inside}</span>' if self.tone else inside


def escape(value: Any) -> str:
    """A value as HTML."""
    return value.html() if isinstance(value, Cell) else html.escape(str(value))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: Any = "", strong: Sequence[bool] = (), height: str = "",
    attributes: Sequence[str] = (),
) -> str:  # fmt: skip
    """A table.

    Args:
        columns: headings.
        rows: cells of each row, as text, number or `Cell`; numbers are aligned right.
        caption: above it.
        strong: which rows are set in bold.
        height: makes a long table scroll, e.g. ``30em``.
        attributes: HTML attributes of each row's ``<tr>``.
    """
    body = []
    for n, row in enumerate(rows):
        extra = f" {attributes[n]}" if n < len(attributes) and attributes[n] else ""
        weight = ' style="font-weight:bold"' if n < len(strong) and strong[n] else ""
        body.append(f"<tr{extra}{weight}>" + "".join(_td(cell) for cell in row) + "</tr>")
    head = "".join(f'<th style="text-align:left">{html.escape(column)}</th>' for column in columns)
    above = f'<caption style="text-align:left;caption-side:top">{escape(caption)}</caption>' if caption else ""
    out = f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div style="{f"max-height:{height};" if height else ""}overflow:auto">{out}</div>'


def _td(cell: Any) -> str:
    number = isinstance(cell, int | float | np.number) and not isinstance(cell, bool)
    return f'<td style="text-align:{"right" if number else "left"}">{escape(cell)}</td>'


def facts(pairs: Mapping[str, Any]) -> str:
    """Names and values on one line that wraps."""
    parts = [f"<span style='white-space:nowrap'><b>{html.escape(key)}</b> {escape(value)}</span>" for key, value in pairs.items()]
    return f'<div style="line-height:1.6">{" · ".join(parts)}</div>'


def folded(title: str, inside: str) -> str:
    """Something to open by a click."""
    return f'<details><summary style="cursor:pointer">{html.escape(title)}</summary>{inside}</details>'


def size(nbytes: int) -> str:
    """Bytes in words."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"


def shape(of: Sequence[int]) -> str:
    """``512 × 256``: rows first."""
    return " × ".join(map(str, of))


# ── models and tensors ────────────────────────────────────────────────────────────────────────────────────────────

_SAMPLE = 1 << 16  # values that are decoded for a look at a tensor


def model_page(path: Path, seen: Mapping[str, Any]) -> str:
    """What `inspect` says, with the tensor table folded; `seen` is what `aprlab.model.description.describe` gives."""
    config = seen["config"]
    head: dict[str, Any] = {
        "file": path.name,
        "format": f"{seen['format'].upper()} ({seen['dialect']})",
        "tensors": size(seen["bytes"]),
    }
    if "error" in config:
        head["config"] = Cell(config["error"], "bad")
    else:
        head |= {"layers": config["block_count"], "width": config["embedding_length"], "vocabulary": config["vocab_size"]}
        head |= {"heads": f"{config['head_count']} ({config['head_count_kv']} for keys and values)"}
    notes = [Cell(f"missing: {name}", "bad") for name in seen["missing"]] + [Cell(word, "open") for word in seen["warnings"]]
    kinds = [[kind, row["tensors"], row["values"], size(row["bytes"])] for kind, row in seen["by_type"].items()]
    tensors = [
        [t["name"], t["type"], shape(t["shape"]), t["bytes"], "-" if t["offset"] is None else t["offset"]]
        for t in seen["tensors"]
    ]
    return "".join([
        facts(head), *(f"<div>{note.html()}</div>" for note in notes),
        table(("type", "tensors", "values", "bytes"), kinds),
        folded(f"{len(tensors)} tensors", table(("name", "type", "shape", "bytes", "offset"), tensors, height="25em")),
    ])  # fmt: skip


def tensor_page(tensor: Any) -> str:
    """Facts about a `Tensor`, and the statistics and spread of its first rows: all may be too many to decode for a look."""
    head: dict[str, Any] = {
        "tensor": tensor.name, "type": tensor.type.name, "shape": shape(tensor.shape), "bytes": size(tensor.nbytes),
        "offset": "-" if tensor.origin.place() is None else tensor.origin.place(), "in": tensor.origin.path.name,
    }  # fmt: skip
    if tensor.origin.name != tensor.name:
        head["called there"] = tensor.origin.name
    rows = min(tensor.rows, max(1, _SAMPLE // tensor.cols))
    try:
        values = tensor.dequantise(slice(0, rows)) if len(tensor.shape) > 1 else tensor.dequantise()
    except AprlabError as error:
        return facts(head) + f"<div>{Cell(error.message, 'bad').html()}</div>"
    finite = values[np.isfinite(values)].astype(np.float64)
    which = "all values" if rows == tensor.rows else f"the first {rows} of {tensor.rows} rows"
    if not finite.size:
        return facts(head) + f"<div>{Cell(f'{which}: none is finite', 'bad').html()}</div>"
    seen = {"mean": finite.mean(), "std": finite.std(), "from": finite.min(), "to": finite.max()}
    figures: dict[str, Any] = {key: f"{value:.4g}" for key, value in seen.items()}
    if finite.size < values.size:
        figures["NaN or Inf"] = Cell(str(values.size - finite.size), "bad")
    return facts(head) + facts({"of": which, **figures}) + histogram(finite)


def histogram(values: np.ndarray, bins: int = 61) -> str:
    """A small histogram as a drawing of its own: values beyond four standard deviations count into the outermost bars."""
    middle, spread = float(values.mean()), float(values.std()) or 1.0
    low, high = max(float(values.min()), middle - 4 * spread), min(float(values.max()), middle + 4 * spread)
    counts = np.histogram(np.clip(values, low, high), bins, (low, high if high > low else low + 1))[0]
    tall = 44 * counts / max(int(counts.max()), 1)
    bars = "".join(f'<rect x="{5 * n}" y="{46 - h:.1f}" width="4" height="{h:.1f}"/>' for n, h in enumerate(tall) if h)
    words = f'<text x="0" y="60">{low:.3g}</text><text x="{5 * bins}" y="60" text-anchor="end">{high:.3g}</text>'
    return (
        f'<svg role="img" aria-label="histogram of the values" viewBox="0 0 {5 * bins} 62" width="{5 * bins}" height="62" '
        f'style="max-width:100%;font-size:11px;fill:var(--jp-ui-font-color1, #333)"><g fill="#0072B2">{bars}</g>{words}</svg>'
    )


__all__ = ["Cell", "escape", "facts", "folded", "histogram", "model_page", "shape", "size", "table", "tensor_page"]
