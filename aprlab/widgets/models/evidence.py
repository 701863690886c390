"""What there is to see for one finding: a picture or a table of the very data that it rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from aprlab import figures
from aprlab.compare import position_errors
from aprlab.errors import AprlabError
from aprlab.formats import apr
from aprlab.onion.layers import Case
from aprlab.onion.layers.base import Match, sample
from aprlab.onion.verdict import Finding, plain, short
from aprlab.qwen2.generate import Session
from aprlab.trace import trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Evidence:
    """Something to look at.

    Attributes:
        title: what is shown.
        caption: what to see in it.
        draw: draws it, or None where a table says more.
        columns, rows: the table.
        size: of the figure, inches.
    """

    title: str
    caption: str
    draw: Callable[[Axes], object] | None = None
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[object, ...], ...] = ()
    size: tuple[float, float] = (8, 3.4)


def of_file(case: Case, finding: Finding) -> Evidence:
    """For a finding of two files (or one)."""
    matches = [m for m in case.matches if m.true in finding.tensors]
    if finding.layer == "naming" and matches:
        return _names(case, matches)
    if finding.layer == "dtype" and matches:
        return _types(matches)
    for match in matches:
        found = _values(case, match)
        if found is not None:
            return found
    return facts(finding)


def of_runs(healthy: Session, other: Session, finding: Finding, prompt: str) -> Evidence:
    """For a finding of two sessions, or of files whose tensors are sound: where their activations or their tokens part."""
    if finding.layer == "tokenizer":
        return _tokens(healthy, other, prompt) or facts(finding)
    try:
        ids = healthy.prompt_tokens(prompt, raw=healthy.model.tokenizer.chat_template is None)
        a, b = trace(healthy, ids, "layers.*.out"), trace(other, ids, "layers.*.out")
        errors = position_errors(a, b)
    except (AprlabError, ValueError, IndexError, TypeError):
        return facts(finding)
    layers, positions = errors.shape
    if not errors.any():
        return facts(finding)

    def draw(ax: Axes) -> object:
        return figures.error_map(errors, list(range(layers)), list(range(positions)), ax, xlabel="position in the prompt")

    first = int(np.flatnonzero(errors.any(axis=0))[0])
    caption = (
        f"Relative error after each layer, at each position; grey is equal bit for bit. The first position that is not: {first}."
    )
    return Evidence("Where the activations part", caption, draw)


def facts(finding: Finding) -> Evidence:
    """The finding's own figures as a table."""
    rows = tuple((key, short(plain(value))) for key, value in finding.evidence.items())
    return Evidence("What was measured", finding.mechanism, columns=("figure", "value"), rows=rows)


def _names(case: Case, matches: list[Match]) -> Evidence:
    rows = tuple((m.piece.name, case.due_name(m.true or ""), m.true or "", m.by) for m in matches)
    caption = "Each tensor was known by its bytes (or by what is said in the last column), not by its name."
    return Evidence("Names in the file", caption, columns=("in the file", "should be", "is (GGUF)", "known by"), rows=rows)


def _types(matches: list[Match]) -> Evidence:
    """What each reading of the label would need, against the bytes that are there."""
    first = {m.piece.code: m for m in reversed(matches)}
    bars: list[tuple[str, float]] = []
    for code, m in sorted(first.items()):
        there = len(m.piece.raw)
        bars.append((f"label {code}: {m.true}, bytes there", there))
        kinds = [*apr.candidates(code), *([m.of.type] if m.of is not None and m.of.type not in apr.candidates(code) else [])]
        for kind in kinds:
            if m.shape[-1] % kind.block_elements == 0:
                true = " (what it is)" if m.of is not None and kind is m.of.type else ""
                bars.append((f"as {kind.name}{true}", kind.nbytes(m.shape)))

    def draw(ax: Axes) -> object:
        with figures.style():
            places = range(len(bars))
            there = [label.endswith("bytes there") for label, _ in bars]
            drawn = ax.barh(places, [n for _, n in bars], color=["#0072B2" if own else "0.7" for own in there])
            ax.bar_label(drawn, labels=[f"{n:,.0f}" for _, n in bars], padding=3, fontsize=8)
            ax.set_yticks(places, [label for label, _ in bars])
            ax.invert_yaxis()
            ax.margins(x=0.14)
            ax.set_xlabel("bytes")
            ax.grid(visible=False, axis="y")
        return ax

    caption = "One tensor of each label. Only a reading whose bar is as long as the blue one above it obeys the size law."
    return Evidence("Labels against sizes", caption, draw, size=(8, 0.35 * len(bars) + 0.9))


def _values(case: Case, match: Match) -> Evidence | None:
    """Values as the file's label and dims have them, against the reference's at the same places."""
    if match.of is None:
        return None
    fitting = match.piece.fitting()
    kind = fitting[0] if fitting else match.kind
    if kind is None:
        return None
    seen = sample(match.piece.raw, kind, match.piece.shape)
    due = sample(match.of.raw, match.of.type, match.of.shape)
    if seen is None or due is None:
        return None
    count = min(seen.size, due.size)
    a, b = due.reshape(-1)[:count], seen.reshape(-1)[:count]
    if np.array_equal(a, b, equal_nan=True):
        return None

    def draw(ax: Axes) -> object:
        return figures.value_scatter(a, b, ("value in the reference", "value in the file"), ax)

    caption = f"{match.true}: {count} values of rows spread over the tensor. On the diagonal they are equal."
    return Evidence("Values against the reference's", caption, draw, size=(4.6, 4.4))


def _tokens(healthy: Session, other: Session, prompt: str) -> Evidence | None:
    from itertools import zip_longest

    sides = []
    for session in (healthy, other):
        try:
            ids = session.prompt_tokens(prompt, raw=session.model.tokenizer.chat_template is None)
            sides.append([f"{n} {session.tokenizer.decode([n])!r}" for n in ids])
        except (AprlabError, ValueError, IndexError, KeyError) as error:
            sides.append([str(error)])
    if sides[0] == sides[1]:
        return None
    rows = tuple((n, a, b, "" if a == b else "differs") for n, (a, b) in enumerate(zip_longest(*sides, fillvalue="")))
    caption = f"{len(sides[0])} tokens in the healthy reading, {len(sides[1])} in the other."
    return Evidence("The prompt as tokens", caption, columns=("position", "healthy", "other", ""), rows=rows)


__all__ = ["Evidence", "facts", "of_file", "of_runs"]
