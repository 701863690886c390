"""One model, converted in several ways, each next to its source: the picture of the front door."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import pyplot as plt

from aprlab import figures
from aprlab.conversion import convert
from aprlab.faults import convert_with, upstream
from aprlab.figures.core import plain
from aprlab.formats import open_model
from aprlab.inference import Session
from aprlab.tracing.comparisons import agreement_rows
from aprlab.tracing.traces import trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 30  # letters of an answer that go into a legend


@dataclass(frozen=True)
class Conversions:
    """What became of one model.

    Attributes:
        source: answer of the source.
        agreement: label -> agreement with the source after each layer, as `agreement_rows` gives it.
        answers: label -> answer.
    """

    source: str
    agreement: dict[str, list[dict[str, Any]]]
    answers: dict[str, str]


def conversions(source: Path, ways: Mapping[str, Sequence[str] | str], prompt: str, max_tokens: int) -> Conversions:
    """Convert a GGUF file to APR in each of `ways`, ask all files the same, and compare them layer by layer.

    A file with faults is read by the ticket's own loader: aprlab would refuse some of them, and nothing would be seen.

    Args:
        source: the GGUF file.
        ways: label -> ids of the faults that the conversion has (none: a sound one), or the type that the weights of a
            sound one are rounded to.
        prompt: question, put to every file.
        max_tokens: length of the answers, at most.

    Raises:
        AprlabError: the source cannot be read, a fault or type is unknown.
    """
    first = Session(open_model(source), engine="reference")
    reference = trace(first, prompt)
    agreement, answers = {}, {}
    with tempfile.TemporaryDirectory(prefix="aprlab-") as folder:
        for label, way in ways.items():
            file = Path(folder) / "model.apr"
            if isinstance(way, str):
                convert(source, file, quantize=way, force=True)
            else:
                convert_with(source, file, list(way), force=True)
            broken = bool(way) and not isinstance(way, str)
            session = upstream.session(file) if broken else Session(open_model(file), engine="reference")
            agreement[label] = agreement_rows(reference, trace(session, reference.tokens))
            answers[label] = session.generate(prompt, max_tokens=max_tokens).text
    return Conversions(first.generate(prompt, max_tokens=max_tokens).text, agreement, answers)


@figures.style()
def of_conversions(found: Conversions) -> tuple[Axes, Axes]:
    """Agreement in dB and as a cosine; the legend says what each file answers."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), width_ratios=(3, 2))
    figures.agreement_plot(found.agreement, left).set_title("Agreement with the GGUF file after each layer")
    figures.agreement_plot(found.agreement, right, measure="cosine").set_title("The same as a cosine")
    handles, labels = left.get_legend_handles_labels()
    for ax in (left, right):
        ax.get_legend().remove()
    said = [f"{label} → {_spoken(text)}" for label, text in zip(labels, found.answers.values(), strict=True)]
    title = f"the GGUF file → {_spoken(found.source)}"
    figure.legend(handles, said, loc="outside lower center", ncols=2, title=title, alignment="left")
    return left, right


def _spoken(text: str) -> str:
    """An answer in a legend: in quotes, cut where it is long, nothing that no font can draw."""
    if not text:
        return "says nothing"
    drawn = "".join(letter if letter.isprintable() and ord(letter) < 0x2500 else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return plain(f"“{drawn if len(drawn) <= LONGEST else drawn[: LONGEST - 1] + '…'}”")


__all__ = ["Conversions", "conversions", "of_conversions"]
