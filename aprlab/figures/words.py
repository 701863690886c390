"""Words of a model: what each layer would say, where two sides say otherwise, answers token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, need_data, nth_colour, plain, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUES = mpl.colors.LinearSegmentedColormap.from_list("likely", ["#ffffff", "#0072b2"])
_BROKEN = "#d55e00"
_CUT = 9  # letters of a token that fit a cell


def spelled(token: str) -> str:
    """A token that is seen: blanks as ``␣``, line feeds as ``⏎``, cut where it is long; nothing that no font can draw."""
    text = token.replace(" ", "␣").replace("\n", "⏎")
    text = "".join(letter if letter.isprintable() and ord(letter) < 0x2500 else "�" for letter in text)
    return text if len(text) <= _CUT else f"{text[: _CUT - 1]}…"


def word_map(
    words: Sequence[Sequence[str]], likely: np.ndarray, rows: Sequence[object], columns: Sequence[str], ax: Axes | None = None
) -> Axes:
    """A token in each cell, on blue that is the deeper the likelier it is: the logit lens, layer by position.

    Args:
        words: text of the tokens, by row.
        likely: probabilities ``(rows, columns)``; nan is orange.
        rows: labels, e.g. layers.
        columns: the tokens at which each is said.

    Raises:
        UsageError: nothing to draw, or shapes that do not agree.
    """
    likely = np.asarray(likely, np.float64)
    if not likely.size or likely.shape != (len(rows), len(columns)) or [len(row) for row in words] != [len(columns)] * len(rows):
        raise UsageError(
            f"probabilities of shape {likely.shape} for {len(rows)} rows and {len(columns)} columns of words",
            code="figures.bad-words",
        )  # fmt: skip
    ax = axes_or_new(ax, 1 + 0.75 * len(columns), 1 + 0.32 * len(rows))
    with style():
        ax.set_facecolor(_BROKEN)
        ax.imshow(np.ma.masked_invalid(likely), cmap=_BLUES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        _write(ax, words, likely)
        ax.set_yticks(range(len(rows)), [plain(row) for row in rows])
        ax.set_xticks(range(len(columns)), [plain(spelled(token)) for token in columns], rotation=60, ha="right")
        ax.set(xlabel="after the token", ylabel="layer")
        ax.grid(visible=False)
        ax.tick_params(length=0)
    return ax


def kl_plot(sides: Mapping[str, np.ndarray], tokens: Sequence[str], ax: Axes | None = None) -> Axes:
    """How far each side's next token is from the reference's, at each token of the prompt.

    Args:
        sides: label -> nats ``(positions,)``; equal ones (0) lie on the axis, nan is a cross at the upper edge.
        tokens: text of the token at each position.

    Raises:
        UsageError: nothing to draw, or a side with another number of positions.
    """
    need_data(sides)
    for label, nats in sides.items():
        if len(nats) != len(tokens):
            raise UsageError(f"{label}: {len(nats)} positions, {len(tokens)} tokens", code="figures.bad-positions")
    ax = axes_or_new(ax, 9, 3.4)
    with style():
        finite = [float(x) for nats in sides.values() for x in nats if np.isfinite(x)]
        top = 1.08 * max([*finite, 0.1])
        for n, (label, nats) in enumerate(sides.items()):
            lost = ~np.isfinite(nats)
            seen = np.where(lost, np.nan, nats)
            ax.plot(seen, label=plain(label), color=nth_colour(n), marker="o", markersize=3.5, linewidth=1.2)
            ax.plot(np.flatnonzero(lost), np.full(lost.sum(), top), color=nth_colour(n), linestyle="", marker="X")
        ax.set_ylim(-0.02 * top, top)
        ax.set_xticks(range(len(tokens)), [plain(spelled(token)) for token in tokens], rotation=90, fontsize=8)
        ax.set(xlabel="after the token", ylabel="KL of the next token, nats")
        ax.legend()
    return ax


def answer_strips(answers: Mapping[str, Sequence[tuple[str, float]]], ax: Axes | None = None) -> Axes:
    """Answers token by token, a row each: the token, and the probability that its model gave it.

    Args:
        answers: label -> (token, probability); an empty answer is an empty row.

    Raises:
        UsageError: no answer at all.
    """
    longest = max((len(steps) for steps in answers.values()), default=0)
    if not longest:
        raise UsageError("no answer has a token", code="figures.no-answers")
    ax = axes_or_new(ax, 1.6 + 0.75 * longest, 0.8 + 0.5 * len(answers))
    likely = np.full((len(answers), longest), np.nan)
    for row, steps in enumerate(answers.values()):
        likely[row, : len(steps)] = [p for _, p in steps]
    with style():
        ax.imshow(np.ma.masked_invalid(likely), cmap=_BLUES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        _write(ax, [[token for token, _ in steps] for steps in answers.values()], likely, figures=True)
        ax.set_yticks(range(len(answers)), [plain(label) for label in answers])
        ax.set_xticks(range(longest), [str(n + 1) for n in range(longest)])
        ax.set_xlabel("token of the answer, and its probability")
        ax.grid(visible=False)
        ax.tick_params(length=0)
        for side in ("top", "right", "left", "bottom"):
            ax.spines[side].set_visible(False)
    return ax


def _write(ax: Axes, words: Sequence[Sequence[str]], likely: np.ndarray, *, figures: bool = False) -> None:
    """The token in each cell, in white on deep blue; with its probability below it if `figures`."""
    for row, tokens in enumerate(words):
        for column, token in enumerate(tokens):
            p = likely[row, column]
            below = f"\n{p:.2f}" if figures and np.isfinite(p) else ""
            colour = "white" if np.isfinite(p) and p > 0.75 else "black"
            ax.text(
                column, row, f"{spelled(token)}{below}", parse_math=False, ha="center", va="center", color=colour, fontsize=8
            )


__all__ = ["answer_strips", "kl_plot", "spelled", "word_map"]
