"""Types: the label in the index, and what the bytes are."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from aprlab.errors import AprlabError, NumericError
from aprlab.formats import apr
from aprlab.model.tensor import Tensor
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase, TensorMatch
from aprlab.onion.layers.layer import Layer
from aprlab.onion.samples import ALIKE, LIKELY, correlation, kinds_for, reference_sample, sample
from aprlab.onion.words import Mechanism
from aprlab.quants import can_encode, dequantise, quantise, types
from aprlab.quants.types import BF16, F16, F32, TensorType

_LIKER = 0.3  # a correlation by which one type beats all others where none is alike: wrong types are at 0.1 and below
_WORSE = 1.5  # a re-encoding may lose that much more than ggml's own encoder would


class DtypeLayer(Layer):
    """The size law first; where several types fit, what the values look like under each."""

    name: ClassVar[str] = "dtype"
    kinds: ClassVar[tuple[str, ...]] = ("type", "encoding")
    shown: ClassVar[tuple[str, ...]] = ("type",)

    def suspect(self, case: FileCase) -> list[Deviation]:
        found: list[Deviation] = []
        for match in case.matches:
            settle(match)
            d = wrong_label(match)
            if d is not None:
                found.append(d)
        case.target = target_of(case)
        if case.ref is not None:
            found += [d for match in case.matches if (d := other_encoding(case, match)) is not None]
        return found

    def repair(self, draft: Draft, deviation: Deviation) -> None:
        if deviation.kind == "encoding":
            if (filled := draft.refill(deviation)) is not None:
                slot, good = filled
                slot.kind = good.type
        elif (slot_ := draft.slot(deviation)) is not None:
            slot_.kind = deviation.expected


def wrong_label(match: TensorMatch) -> Deviation | None:
    """The label of a piece, where it is not that of its bytes, or was another type's once."""
    p, kind = match.piece, match.kind
    true = match.true or p.name
    if kind is not None and kind is labelled_rows(match):
        return None
    label = [t for t in apr.candidates(p.code) if t.fits(match.shape, p.size)]
    means = "/".join(t.name for t in apr.candidates(p.code)) or "nothing"
    evidence: dict[str, Any] = {
        "label": p.code, "label_means": means, "bytes": p.size,
        "fits": [t.name for t in LIKELY if t.fits(match.shape, p.size)],
    }  # fmt: skip
    if match.correlation is not None:
        evidence["correlation"] = round(match.correlation, 6)
    if kind is None:
        cause = Mechanism("dtype.no-type-fits", {"label": p.code})
        if match.open_kinds:
            cause = Mechanism("dtype.several-types-fit", {"label": p.code, "types": [t.name for t in match.open_kinds]})
        return Deviation(
            "type", true, p.code, None, cause, match, evidence, 0.5, ambiguous=bool(match.open_kinds)
        )
    if len(label) == 1 and label[0] is kind:
        if p.code == kind.code:
            return None
        cause = Mechanism("dtype.shared-code", {"type": kind.name, "label": p.code})
        return Deviation("type", true, p.code, kind, cause, match, evidence, harmless=True)
    cause = Mechanism("dtype.code-of-another-type", {"type": kind.name, "label": p.code, "means": means})
    sure = 1.0 if len(match.open_kinds) < 2 else 0.8
    return Deviation("type", true, p.code, kind, cause, match, evidence, sure)


def other_encoding(case: FileCase, match: TensorMatch) -> Deviation | None:
    """A tensor that is held in another type than the reference's: measured, not condemned."""
    if match.of is None or match.kind is None or match.equal:
        return None
    cause = rounded(match)
    if cause is None and match.kind is match.of.type:
        return None
    evidence = loss(case, match)
    if evidence is None:
        return None
    types_ = {"before": match.of.type.name, "after": match.kind.name}
    if cause is not None:
        evidence = {"rel_l2": evidence["rel_l2"]}
    elif evidence["worse_than_ggml"] > _WORSE:
        return None  # the layers of bytes have to say what happened to it
    else:
        cause = Mechanism("dtype.decoded" if evidence["rel_l2"] == 0 else "dtype.re-encoded", types_)
    return Deviation(
        "encoding", match.true or "", match.kind.name, match.of, cause, match, evidence, harmless=True
    )


def rounded(match: TensorMatch) -> Mechanism | None:
    """A code for floats of which one side's are the other's, rounded to 16 bits, to the last bit; None where they are not.

    A model that went through a BF16 or F16 file has lost bits that way, and is the same model.
    """
    of, kind = match.of, match.kind
    if of is None or kind is None or not {of.type, kind} <= {F32, F16, BF16} or len(match.piece.raw) != kind.nbytes(of.shape):
        return None
    held = Tensor(of.name, kind, of.shape, match.piece.raw, of.origin)
    step = max(1, (1 << 20) // max(of.cols, 1)) if len(of.shape) > 1 else None
    parts = [slice(n, n + step) for n in range(0, of.rows, step)] if step is not None else [None]
    for narrow in (BF16, F16):
        for code, coarser, finer in (("dtype.file-rounded", held, of), ("dtype.reference-rounded", of, held)):
            if all(_rounds_to(finer.dequantise(rows), narrow, coarser.dequantise(rows)) for rows in parts):
                return Mechanism(code, {"type": narrow.name})
    return None


def _rounds_to(finer: np.ndarray, kind: TensorType, coarser: np.ndarray) -> bool:
    """Whether `finer`, held as `kind`, has the very bits of `coarser`; what cannot be held (NaN, too large) has not."""
    try:
        held = dequantise(quantise(finer, kind).reshape(-1), kind, finer.shape)
    except NumericError:
        return False
    return np.array_equal(held.view(np.uint32), coarser.view(np.uint32))


def labelled_rows(match: TensorMatch) -> TensorType | None:
    """The type in the label of a matrix that has more or fewer rows than it should have, and obeys the size law as it is."""
    p, of = match.piece, match.of
    if of is None or len(p.shape) != 2 or len(of.shape) != 2 or p.shape[1] != of.shape[1] or p.shape[0] == of.shape[0]:
        return None
    fitting = p.fitting()
    return fitting[0] if len(fitting) == 1 else None


def settle(match: TensorMatch) -> None:
    """Find out which type the bytes are: the reference's where they are its bytes, else by values, else by size alone."""
    p = match.piece
    if match.of is not None:
        if match.equal or match.by == "span":
            match.kind = match.of.type
            return
        if (label_ := labelled_rows(match)) is not None:
            match.kind = label_
            return
        options = kinds_for(p, match.of)
        expected = reference_sample(match.of)
        scores: dict[TensorType, float] = {}
        for kind in options:
            values = sample(p.raw, kind, match.of.shape)
            scores[kind] = 0.0 if values is None or expected is None else correlation(values, expected)
        best = max(scores, key=lambda kind: scores[kind], default=None)
        if best is not None and scores[best] > ALIKE:
            match.kind, match.correlation = best, scores[best]
            return
        ranked = sorted(scores.values(), reverse=True)
        if best is not None and ranked[0] > _LIKER and (len(ranked) == 1 or ranked[0] - ranked[1] > _LIKER):
            match.kind, match.correlation = best, scores[best]  # changed values, and still those of one type only
            return
        # The values are nobody's: then what they look like, the label if it is legal, or the reference's type.
        looks = by_looks(p.raw, match.of.shape, options) if len(options) > 1 else None
        label = [t for t in apr.candidates(p.code) if t.fits(match.of.shape, p.size)]
        likely = [*([looks] if looks else []), *label, *(t for t in options if t is match.of.type)]
        likely = likely or (options if len(options) == 1 else [])
        match.kind = likely[0] if likely else None
        match.correlation = None if match.kind is None else scores[match.kind]
        match.open_kinds = tuple(options)
        return
    label = p.fitting()
    options = [t for t in LIKELY if t.fits(p.shape, p.size)]
    if len(label) == 1:
        # A label may be legal and wrong: Q4_K, Q4_0 and AprQ4 have one density. It stands unless another looks better by far.
        better = by_looks(p.raw, p.shape, options) if len(options) > 1 else None
        match.kind = better if better is not None else label[0]
        match.open_kinds = tuple(options) if match.kind is not label[0] else ()
        return
    if len(options) <= 1:
        match.kind = options[0] if options else None
        return
    match.kind, match.open_kinds = by_looks(p.raw, p.shape, options), tuple(options)


def by_looks(raw: np.ndarray, shape: tuple[int, ...], options: list[TensorType]) -> TensorType | None:
    """The one type under which the values look like weights; None where none or several do.

    Weights are finite, centred and of like size from row to row. Blocks read as another type of the same density take
    numbers for scales: f16 patterns that are NaN, or scales many powers of ten apart.
    """
    spread = {}
    for kind in options:
        values = sample(raw, kind, shape)
        if values is None or not np.isfinite(values).all():
            continue
        rows = values.reshape(-1, min(32, values.shape[-1])).astype(np.float64)
        size = np.sqrt((rows**2).mean(axis=1))
        if not (size > 0).any():
            continue
        logs = np.log10(np.maximum(size, size.max() * 1e-9))
        spread[kind] = float(logs.std() + abs(np.log10(max(size.mean(), 1e-12)) + 1.5) * 0.1)
    ranked = sorted(spread, key=lambda kind: spread[kind])
    if not ranked or (len(ranked) > 1 and spread[ranked[1]] < 2 * spread[ranked[0]]):
        return None
    return ranked[0]


def target_of(case: FileCase) -> TensorType | None:
    """The type that the 2-D weights were re-encoded to, where they were: the one that most of them have now."""
    if case.ref is None:
        return None
    votes: dict[TensorType, int] = {}
    for match in case.matches:
        if match.of is not None and match.kind is not None and len(match.of.shape) > 1 and match.kind is not match.of.type:
            votes[match.kind] = votes.get(match.kind, 0) + 1
    if not votes:
        return None
    return max(votes, key=lambda kind: votes[kind])


def loss(case: FileCase, match: TensorMatch) -> dict[str, Any] | None:
    """What holding a tensor in another type costs: relative l2 error of sampled rows, against ggml's own encoder."""
    assert match.of is not None
    assert match.kind is not None
    expected, got = reference_sample(match.of), sample(match.piece.raw, match.kind, match.of.shape)
    if expected is None or got is None:
        return None
    norm = float(np.linalg.norm(expected.astype(np.float64))) or 1.0
    error = float(np.linalg.norm(expected.astype(np.float64) - got.astype(np.float64))) / norm
    own = 0.0
    if can_encode(match.kind) and match.kind.tensor_bytes == 0:
        try:
            again = dequantise(quantise(expected, match.kind), match.kind, expected.shape)
            own = float(np.linalg.norm(expected.astype(np.float64) - again.astype(np.float64))) / norm
        except AprlabError:
            own = 0.0
    elif match.kind is types.APR_Q8:
        whole = case.healthy(match.of, match.kind)
        again_ = sample(whole.raw, match.kind, match.of.shape)
        own = 0.0 if again_ is None else float(np.linalg.norm(expected.astype(np.float64) - again_.astype(np.float64))) / norm
    ratio = 0.0 if error == 0 else error / own if own else float("inf")
    if own == 0 and error < 1e-6:
        ratio = 0.0  # the last bit of a float type
    return {"rel_l2": error, "ggml_rel_l2": own, "worse_than_ggml": ratio}
