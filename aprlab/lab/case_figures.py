"""The telling figure of a case that is not two files: programs on one model, or faults that say a sentence."""

from __future__ import annotations

import math
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
from aprlab.sources.servers import ServerSource
from aprlab.tracing.comparisons import agreement_rows
from aprlab.tracing.words import answer_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 12  # suspects in a figure
_ANSWER = 12  # tokens of a server's answer that are drawn


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

    Servers give no values of layers: where all are servers, their answers are shown token by token, below ours.

    Args:
        model: the file that all of them run.
        sources: their names, as `peel` takes them; of recordings the ids are those that were recorded.

    Raises:
        UsageError: a program that gives no outputs of layers.
        ServerError, ServerRefusal: a server that does not answer.
    """
    opened = open_model(model)
    tokens, asked = tokens_for(opened, prompt, None)
    sides = {}
    spoken: dict[str, list[tuple[str, float]]] = {}
    session = Session(opened)
    with EngineSource(session) as ours:
        for spec in sources:
            with made_source(spec, opened, None) as source:
                if isinstance(source, ServerSource):
                    label = f"server {len(spoken) + 1}"  # not its address: the picture is handed over
                    spoken[label] = _spoken(source, tokens[:asked], session)
                    continue
                ids, count = source.recorded if source.recorded is not None else (tokens, asked)
                sides[spec] = agreement_rows(ours.run(ids, prompt=count), source.run(ids, prompt=count))
    if not sides:
        ax = figures.answer_strips({"our engine": answer_steps(session, prompt, _ANSWER), **spoken}, ax)
        ax.set_title("the answer, token by token")
        return ax
    ax = figures.agreement_plot(sides, ax)
    ax.set_title("agreement with our engine in float32 after each layer")
    return ax


def _spoken(server: ServerSource, ids: Sequence[int], session: Session) -> list[tuple[str, float]]:
    """A server's greedy answer: text and probability of each token; nan where it gives none."""
    answer = server.complete(list(ids), _ANSWER)
    if not answer.steps:
        return [(answer.text, math.nan)]
    steps = []
    for step in answer.steps:
        if step.token in session.tokenizer.eog:
            break
        text = step.text if step.token is None else session.tokenizer.decode([step.token])
        steps.append((text, math.exp(step.top[step.token]) if step.token in step.top else math.nan))
    return steps


__all__ = ["of_ranking", "of_sources"]
