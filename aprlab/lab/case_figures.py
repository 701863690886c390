"""The telling figure of a case that is not two files: programs on one model, or faults that say a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aprlab import figures
from aprlab.faults import by_id
from aprlab.forensics.ranking import FITS, Forensics
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.onion.source_peeling import made_source, tokens_for
from aprlab.sources.engines import EngineSource
from aprlab.tracing.comparisons import agreement_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 12  # suspects in a figure


def of_ranking(found: Forensics, ax: Axes | None = None) -> Axes:
    """The best suspects, by the layer of the onion that they belong to.

    Raises:
        UsageError: nothing could be run.
    """
    best = [suspect for suspect in found.suspects if suspect.match is not None][:_SHOWN]
    scores = {" + ".join(s.faults): s.match.score for s in best if s.match is not None}
    groups = {" + ".join(s.faults): by_id(s.faults[0]).layer for s in best}
    return figures.ranking_bars(scores, groups, ax, enough=FITS)


def of_sources(model: str | Path, sources: Sequence[str], prompt: str, ax: Axes | None = None) -> Axes:
    """How far each program agrees with our engine after each layer, on the same token ids.

    Args:
        model: the file that all of them run.
        sources: their names, as `peel` takes them; of recordings the ids are those that were recorded.

    Raises:
        UsageError: a program that gives no outputs of layers.
    """
    opened = open_model(model)
    tokens, asked = tokens_for(opened, prompt, None)
    sides = {}
    with EngineSource(Session(opened)) as ours:
        for spec in sources:
            with made_source(spec, opened, None) as source:
                ids, count = source.recorded if source.recorded is not None else (tokens, asked)
                sides[spec] = agreement_rows(ours.run(ids, prompt=count), source.run(ids, prompt=count))
    ax = figures.agreement_plot(sides, ax)
    ax.set_title("agreement with our engine in float32 after each layer")
    return ax


__all__ = ["of_ranking", "of_sources"]
