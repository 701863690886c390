"""A picture for each finding of `peel`: where in the model it is, and what it does there.

The figures themselves take data (`aprlab.figures`); here the data of a finding is gathered from the case that `peel`
made, or from two sessions. Notebook and explorer show the same picture.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt

from aprlab import figures
from aprlab.engines import AUTO, choose
from aprlab.errors import BROKEN, AprlabError, UsageError, reason
from aprlab.figures.core import axes_or_new
from aprlab.formats import apr
from aprlab.inference.session import Session
from aprlab.model.tensor import Tensor
from aprlab.onion import block_marks
from aprlab.onion.block_marks import Mark
from aprlab.onion.file_case import FileCase
from aprlab.onion.fixes import drafted
from aprlab.onion.lost_information import tensors_of
from aprlab.onion.verdict import Finding, short
from aprlab.published import QUESTION
from aprlab.quants import dequantise
from aprlab.quants.types import TensorType
from aprlab.tracing.comparisons import agreement_rows, layer_errors, position_errors
from aprlab.tracing.traces import replay, trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from aprlab.onion.file_case import TensorMatch

SPACE = 1 << 18  # values of a tensor that are decoded for a picture, at most
_OF_BLOCKS = ("layout", "decode", "weights")  # layers whose faults may spoil the marks of blocks
_CALM, _HIT, _OTHER, _GONE = "as it should be", "this finding", "another finding", "not in the file"

_WHAT_TO_SEE = {
    "container": "Right: how many tensors have their bytes where the index says, and how many have them anywhere in the file.",
    "naming": "Right: what a reader finds by name, and what is in the file under any name.",
    "dtype": "Right: the bytes in the file, by their true type, and the bytes that the labels would need.",
    "layout": "Right: values at the same position in both files. Correct ones would all be on the thin line.",
    "decode": "Right: values at the same position in both files. Correct ones would all be on the thin line.",
    "weights": "Right: values at the same position in both files. Correct ones would all be on the thin line.",
    "config": "Left: error that each step introduces, on healthy input. Right: error at each position. Light grey is equal.",
    "tokenizer": "The prompt as both sides tokenize it, and where they agree.",
    "forward": "Left: error that each step introduces, on healthy input. Right: error at each position. Light grey is equal.",
    "instrument": "Nothing to see in the model: the measurement is void.",
}


def caption(finding: Finding, *, run: bool = False) -> str:
    """One or two sentences about what the picture of this finding shows; `run`: the one that `of_run` draws."""
    if run and finding.layer != "tokenizer":
        return _WHAT_TO_SEE["forward"]
    runs = finding.layer in ("config", "forward", "tokenizer", "instrument")
    where = "" if runs else "Left: all tensors of the model, one row per kind, one column per layer. "
    return where + _WHAT_TO_SEE[finding.layer]


def caption_alone(finding: Finding) -> str:
    """The same for a file that is judged without a reference: what `of_alone` draws."""
    if not finding.tensors:
        return "a sign of the run as a whole; there is no tensor to point at"
    return (
        "Left: all tensors of the model, one row per kind, one column per layer. "
        "Right: a mark that no healthy file has, or what is known."
    )


@figures.style()
def of_file(
    finding: Finding, case: FileCase, axes: Sequence[Axes] | None = None, *, others: Sequence[Finding] = (),
    prompt: str = QUESTION,
) -> tuple[Axes, Axes]:  # fmt: skip
    """Two axes about a finding in a file: the tensors concerned, and what happened to them.

    Args:
        finding, case: as `aprlab.onion.peeling.examine` gives them.
        axes: two to draw on; a new figure without.
        others: the other findings of the verdict, drawn in a colour of their own.
        prompt: what both sides run, where config or tokenizer is concerned.

    Raises:
        UsageError: the verdict was reached without a reference, and there is nothing to hold the file against.
    """
    if case.ref is None:
        raise UsageError("a figure of a finding needs a reference; there is none here", code="lab.no-reference")
    if finding.layer in ("config", "tokenizer"):
        sides = _sides(case)
        if sides is not None:
            return of_run(finding, *sides, axes, prompt=prompt)
    left, right = _pair(axes)
    _where(finding, case, others, left)
    if finding.layer in ("container", "naming"):
        _reached(case, right)
    elif finding.layer == "dtype":
        _needed(finding, case, right)
    elif finding.tensors:
        _values(finding, case, right)
    else:
        _say(right, "nothing of this can run")
    return left, right


@figures.style()
def of_run(
    finding: Finding, a: Session, b: Session, axes: Sequence[Axes] | None = None, *, prompt: str = QUESTION
) -> tuple[Axes, Axes]:
    """Two axes about a finding in a run: error of each step on sound inputs, and error by position.

    Args:
        a, b: the reference session and the candidate.
    """
    left, right = _pair(axes)
    try:
        if finding.layer == "tokenizer":
            _tokens(a, b, left, right, prompt)
            return left, right
        sound = trace(a, prompt, raw=a.wants_raw)
        steps, alone = layer_errors(sound, replay(b, sound))
        positions = position_errors(sound, trace(b, sound.tokens))
    except BROKEN as error:
        _say(left, "a run to its end is not possible:")
        _say(right, reason(error)[:90])
        return left, right
    layers = range(a.config.block_count)
    figures.error_map(alone, layers, steps, left, xlabel="")
    left.set_title("introduced by each step")
    figures.error_map(positions, layers, range(positions.shape[1]), right, xlabel="position")
    right.set_title("after each layer, by position")
    return left, right


def _sides(case: FileCase) -> tuple[Session, Session] | None:
    """Both files ready to run; None where one cannot."""
    model = drafted(case, [])
    if case.ref is None or isinstance(model, AprlabError):
        return None
    engine = choose(AUTO, case.ref.model)
    try:
        return Session(case.ref.model, engine=engine), Session(model, engine=engine)
    except BROKEN:
        return None


def _pair(axes: Sequence[Axes] | None) -> tuple[Axes, Axes]:
    if axes is None:
        axes = plt.subplots(1, 2, figsize=(12, 4.2))[1]
    left, right = (axes_or_new(ax) for ax in axes)
    return left, right


def _say(ax: Axes, text: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, parse_math=False, ha="center", va="center", wrap=True)


def _where(finding: Finding, case: FileCase, others: Sequence[Finding], ax: Axes) -> None:
    there = {match.true for match in case.matches if match.true is not None}
    every = list(case.ref.tensors) if case.ref is not None else sorted(there, key=_in_order)
    hit, else_ = set(finding.tensors), {name for other in others if other is not finding for name in other.tensors}
    cells = {
        name: _HIT if name in hit else _GONE if name not in there else _OTHER if name in else_ else _CALM
        for name in [*every, *(name for name in finding.tensors if name not in set(every))]
    }
    figures.tensor_map(cells, (_CALM, _HIT, _OTHER, _GONE), ax)


def _in_order(name: str) -> tuple[int, str]:
    """Tensors outside the layers, then layer by layer."""
    parts = name.split(".", 2)
    return (int(parts[1]), parts[2]) if parts[0] == "blk" and len(parts) == 3 and parts[1].isdigit() else (-1, name)


def _reached(case: FileCase, ax: Axes) -> None:
    """What a look-up by name gives, next to what is in the file at all."""
    assert case.ref is not None
    by_name = {match.piece.name: match for match in case.matches}
    counts = {"by its name": [0, 0, 0], "by its bytes": [0, 0, 0]}
    found = {match.true for match in case.matches if match.equal or match.by in ("content", "span", "values")}
    for name in case.ref.tensors:
        match = by_name.get(case.expected_name(name))
        place = 2 if match is None else int(not (match.true == name and match.place is None))
        counts["by its name"][place] += 1
        counts["by its bytes"][0 if name in found else 2] += 1
    parts = ("the right tensor", "something else", "nothing")
    figures.coverage_bars({how: dict(zip(parts, line, strict=True)) for how, line in counts.items()}, ax)
    ax.set_xlabel("tensors, looked up…")


def _needed(finding: Finding, case: FileCase, ax: Axes) -> None:
    """Bytes in the file, and bytes that the labels demand, by the type that the tensors have in truth."""
    there: dict[str, int] = {}
    demanded: dict[str, int] = {}
    labels: set[str] = set()
    for match in _concerned(finding, case):
        real = match.kind or (match.of.type if match.of is not None else None)
        kind = real.name if real is not None else "unknown"
        options = _labels(match)
        labelled = match.piece.fitting() or options
        there[kind] = there.get(kind, 0) + len(match.piece.raw)
        demanded[kind] = demanded.get(kind, 0) + (labelled[0].nbytes(match.shape) if labelled else 0)
        labels.add(f"{match.piece.code} = {'/'.join(t.name for t in options) or 'nothing known'}")
    figures.inventory_bars({"in the file": there, "as labelled": demanded}, ax)
    ax.set_title(f"labels in the file: {', '.join(sorted(labels))}"[:70])


def _labels(match: TensorMatch) -> list[TensorType]:
    """Types that the label has stood for and whose blocks fit the rows."""
    return [kind for kind in apr.candidates(match.piece.code) if match.shape[-1] % kind.block_elements == 0]


def _values(finding: Finding, case: FileCase, ax: Axes) -> None:
    """Values of the first concerned tensor that can be decoded on both sides."""
    for match in _concerned(finding, case):
        if match.of is None:
            continue
        seen = _seen(match)
        if seen is not None and seen.size == match.of.size:
            truth = match.of.dequantise()
            some = slice(None, None, -(-truth.size // SPACE))
            figures.value_scatter(truth.ravel()[some], seen.ravel()[some], ("reference", "candidate"), ax)
            ax.set_title(match.of.name)
            return
    _say(ax, "no concerned tensor has values on both sides")


def _seen(match: TensorMatch) -> np.ndarray | None:
    """What the file gives for it: float32, or None where its bytes do not fit its type and shape."""
    kind = match.kind or next(iter(match.piece.fitting()), None)
    if kind is None:
        return None
    try:
        return dequantise(np.ascontiguousarray(match.piece.raw), kind, match.piece.shape)
    except (AprlabError, ValueError):
        return None


def _concerned(finding: Finding, case: FileCase) -> list[TensorMatch]:
    wanted = set(finding.tensors)
    return [match for match in case.matches if match.true in wanted]


def _tokens(a: Session, b: Session, left: Axes, right: Axes, prompt: str) -> None:
    """The prompt's ids on both sides: how many, and where they agree."""
    ids = [side.prompt_tokens(prompt, raw=side.wants_raw) for side in (a, b)]
    longest = max(map(len, ids))
    agree = [n < min(map(len, ids)) and ids[0][n] == ids[1][n] for n in range(longest)]
    figures.check_strip(agree, left, xlabel="token of the prompt")
    left.set_title(f"{agree.count(True)} of {longest} agree")
    ends = [sorted(side.tokenizer.eog) for side in (a, b)]
    sizes = {"reference": {"tokens": len(ids[0])}, "candidate": {"tokens": len(ids[1])}}
    figures.coverage_bars(sizes, right, xlabel="tokens of the prompt")
    right.set_title("ends of an answer: " + ("the same tokens" if ends[0] == ends[1] else f"{ends[0]}, {ends[1]}"), pad=24)


@figures.style()
def of_alone(
    finding: Finding, case: FileCase | None, axes: Sequence[Axes] | None = None, *, others: Sequence[Finding] = ()
) -> tuple[Axes, Axes]:  # fmt: skip
    """Two axes about a finding in a file without a reference: the tensors concerned, and a mark that no healthy file has.

    In words where the finding concerns no tensor, or no mark is odd.

    Args:
        finding, case: as `aprlab.onion.peeling.examine` gives them; no case: the file could not be looked into.
        axes: two to draw on; a new figure without.
        others: the other findings of the verdict, drawn in a colour of their own.
    """
    left, right = _pair(axes)
    tensors = [] if case is None else tensors_of(case)
    if case is not None and finding.tensors:
        _where(finding, case, others, left)
    else:
        _say(left, "\n".join(textwrap.wrap(finding.mechanism, 44)))
    concerned = [tensor for tensor in tensors if tensor.name in set(finding.tensors)]
    odd = block_marks.unlikely(concerned) if finding.layer in _OF_BLOCKS else []
    if odd:
        of_mark(odd[0], tensors, right)
    else:
        lines = [f"{key}: {short(value)}"[:120] for key, value in list(finding.evidence.items())[:8]]
        facts = "\n".join(part for line in lines for part in textwrap.wrap(line, 44))
        _say(right, facts or "no figures")
    return left, right


@figures.style()
def of_mark(mark: Mark, tensors: Sequence[Tensor], ax: Axes | None = None) -> Axes:
    """One mark of healthy blocks: what they have, and what each tensor of this file has.

    Args:
        mark: of the file as a whole.
        tensors: of the file; those of another type, or with too few blocks, have no dot.
        ax: to draw on; a new figure without.
    """
    each = (block_marks.marks_of([tensor], least=256) for tensor in tensors if tensor.type is mark.type)
    values = [found.value for marks in each for found in marks if found.name == mark.name and np.isfinite(found.value)]
    known = block_marks.measured(mark.name, mark.type)
    return figures.null_strip(values or [mark.value], mark.healthy, known, ax, xlabel=f"{mark.type.name}: {mark.name}")


@figures.style()
def of_marks(tensors: Sequence[Tensor], axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
    """The two marks of a file that are oddest; where none is odd, two that show its health.

    Raises:
        UsageError: no tensor has blocks with marks.
    """
    marks = sorted((mark for mark in block_marks.marks_of(tensors) if np.isfinite(mark.value)), key=lambda mark: mark.likely)
    if not marks:
        raise UsageError("no tensor of this file has blocks with marks", code="lab.no-marks")
    left, right = _pair(axes)
    of_mark(marks[0], tensors, left)
    if len(marks) > 1:
        of_mark(marks[1], tensors, right)
    else:
        _say(right, "there is no other mark")
    return left, right


@figures.style()
def of_agreement(reference: Session, others: Mapping[str, Session], prompt: str, ax: Axes | None = None) -> Axes:
    """Agreement with the reference after each layer, a line for each of `others`, on the reference's prompt ids."""
    sound = trace(reference, prompt, raw=reference.wants_raw)
    sides = {label: agreement_rows(sound, trace(session, sound.tokens)) for label, session in others.items()}
    ax = figures.agreement_plot(sides, ax)
    ax.set_title("agreement with the reference after each layer")
    return ax


@figures.style()
def inherited_and_introduced(
    steps: Sequence[str], total: np.ndarray, alone: np.ndarray, axes: Sequence[Axes] | None = None
) -> tuple[Axes, Axes]:
    """Error of each step of each layer in the suspected run, and of each step on sound inputs: ``(layers, steps)``."""
    left, right = _pair(axes)
    limits = figures.error_limits(total, alone)
    for ax, errors, title in ((left, total, "inherited and introduced"), (right, alone, "introduced by each step")):
        bar = (left, right) if ax is right else False  # one for both
        figures.error_map(errors, range(len(errors)), steps, ax, xlabel="", limits=limits, bar=bar).set_title(title)
    return left, right
