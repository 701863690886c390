"""Types: the label in the index, and what the bytes are."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from aprlab.errors import AprlabError, NumericError, UnsupportedError
from aprlab.formats import apr
from aprlab.model.tensor import Tensor
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase, TensorMatch
from aprlab.onion.importance import IMPORTANCE, columns_that_count
from aprlab.onion.layers.layer import Layer
from aprlab.onion.looks import FLOATS, by_looks
from aprlab.onion.row_errors import beyond, beyond_both, row_errors, tilted
from aprlab.onion.samples import ALIKE, LIKELY, correlation, kinds_for, reference_sample, sample
from aprlab.onion.words import Mechanism
from aprlab.quants import can_encode, dequantise, quantise, types
from aprlab.quants.bounds import LOST, MARGIN, ROUNDED, pair_limits, row_limits
from aprlab.quants.types import BF16, F16, F32, TensorType

_LIKER = 0.3  # a correlation by which one type beats all others where none is alike: wrong types are at 0.1 and below
_AS_GOOD = 1e-3  # correlations that near do not speak against a lawful label
_APART = 1.2  # rows that lose that much more than a re-encoding were not made from the reference's values
_GRID = 29.5  # distinct values of 32 neighbours: F32 weights have 32, rounded to BF16 31, decoded from 6 bits and less below 29
_FIRST = 4  # rows that are encoded first: most tensors need no more
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
        if case.ref is None:
            found += on_a_grid(case)
        else:
            found += [d for match in case.matches if (d := other_encoding(case, match)) is not None]
        return found

    def repair(self, draft: Draft, deviation: Deviation) -> None:
        if deviation.kind == "encoding":
            if (filled := draft.refill(deviation)) is not None:
                slot, good = filled
                slot.kind = good.type
        elif (slot_ := draft.slot(deviation)) is not None:
            slot_.kind = deviation.expected


def on_a_grid(case: FileCase) -> list[Deviation]:
    """Without a reference: matrices kept as F32 with the few distinct values of decoded blocks; nothing a run can notice."""
    matrices = [m for m in case.matches if len(m.piece.shape) == 2 and m.true is not None]
    if not matrices or any(m.kind is not F32 for m in matrices):
        return []
    shares = {id(m): share for m in matrices if (share := distinct_neighbours(m)) is not None}
    coarse = [m for m in matrices if shares.get(id(m), 32.0) < _GRID]
    if 2 * len(coarse) < len(matrices):
        return []
    cause = Mechanism("dtype.values-on-a-grid", {"type": F32.name, "distinct": round(float(np.mean(list(shares.values()))), 1)})
    return [Deviation("encoding", m.true or "", F32.name, None, cause, m, confidence=0.9, harmless=True) for m in coarse]


def distinct_neighbours(match: TensorMatch) -> float | None:
    """How many of 32 neighbouring values of a row differ, on average: trained floats nearly all do, decoded blocks do not."""
    assert match.kind is not None
    values = sample(match.piece.raw, match.kind, match.piece.shape)
    if values is None or values.shape[-1] < 32:
        return None
    groups = np.sort(values[:, : values.shape[-1] // 32 * 32].reshape(-1, 32), axis=1)
    groups = groups[np.ptp(groups, axis=1) > 0]
    return float((np.diff(groups, axis=1) != 0).sum(axis=1).mean() + 1) if len(groups) else None


def wrong_label(match: TensorMatch) -> Deviation | None:
    """The label of a piece, where it is not that of its bytes, or was another type's once."""
    p, kind = match.piece, match.kind
    true = match.true or p.name
    if kind is not None and (kind is labelled_rows(match) or kind is labelled_reversed(match)):
        return None
    label = [t for t in apr.candidates(p.code) if t.fits(match.shape, p.size)]
    means = "/".join(t.name for t in apr.candidates(p.code)) or (
        types.FOREIGN[p.code].name if p.code in types.FOREIGN else "nothing"
    )
    evidence: dict[str, Any] = {
        "label": p.code, "label_means": means, "bytes": p.size,
        "fits": [t.name for t in LIKELY if t.fits(match.shape, p.size)],
    }  # fmt: skip
    if match.correlation is not None:
        evidence["correlation"] = round(match.correlation, 6)
    if match.looks:
        evidence["looks"] = {name: looks.to_json() for name, looks in match.looks.items()}
    if kind is None:
        cause = Mechanism("dtype.no-type-fits", {"label": p.code})
        if p.code in types.FOREIGN:
            cause = Mechanism("dtype.foreign-code", {"label": p.code, "message": str(types.FOREIGN[p.code])})
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
    """A tensor that is held in another type than the reference's: every row is measured, none condemned within its bound."""
    of, kind = match.of, match.kind
    if of is None or kind is None or match.equal:
        return None

    def found(cause: Mechanism, evidence: dict[str, Any]) -> Deviation:
        return Deviation("encoding", match.true or "", kind.name, of, cause, match, evidence, harmless=True)

    cause = rounded(match)
    if cause is not None:
        evidence = loss(case, match)
        return None if evidence is None else found(cause, {"rel_l2": evidence["rel_l2"]})
    types_ = {"before": of.type.name, "after": kind.name}
    if kind is of.type:
        return found(Mechanism("dtype.re-encoded", types_), {"re_encoded_through": "F32"}) if encoded_again(match) else None
    match.rows = row_errors(of, kind, match.piece.raw)
    if match.rows is None:
        return None
    evidence = _measured(case, match)
    match.apart = made_apart(match, evidence)
    if match.apart:
        evidence |= _measured_apart(match)
    worse = 0.0 if {of.type, kind} <= set(FLOATS) else evidence.get("worse_than_ggml", 0.0)
    try:
        strange = len(strange_rows(match)) and not _encoded_rightly(case, match)
        if strange or evidence.get("worse_than_both", worse) > _WORSE:
            columns = kept_by_importance(of, kind, match.piece.raw, match.apart)
            if columns is None:
                return None  # the layers of bytes have to say what happened to it
            evidence["columns_compared"] = f"{len(columns)} of {of.cols}: its quantiser let others go (importance)"
    except UnsupportedError:
        return None
    if match.apart:
        return found(Mechanism("dtype.one-source", types_), evidence)
    exact = not match.rows.dd.any()
    return found(Mechanism("dtype.decoded" if exact else "dtype.re-encoded", types_), evidence)


def kept_by_importance(of: Tensor, kind: TensorType, raw: np.ndarray, apart: bool = False) -> np.ndarray | None:
    """Columns that the quantiser kept, where its errors have the form of importance and no row is strange in these columns.

    Args:
        of: the reference's tensor.
        kind: type of the file's.
        raw: uint8, its bytes.
        apart: the file's was not made from the reference's values.

    Returns:
        int64 column numbers; None where a row is strange, or the errors have another form.

    Raises:
        UnsupportedError: no bound is known for a type.
    """
    columns = columns_that_count(of, kind, raw)
    rows = None if columns is None else row_errors(of, kind, raw, columns)
    if columns is None or rows is None:
        return None
    norms = np.sqrt(rows.aa)
    limit = row_limits(kind, norms, rows.columns, rows.peak)
    if apart:
        limit = pair_limits(of.type, kind, norms, rows.columns, rows.peak)
    bad = ~(np.sqrt(rows.dd) <= IMPORTANCE * limit)
    bad[rows.zero] = True
    return None if bad.any() or (not apart and len(tilted(rows))) else columns


def _encoded_rightly(case: FileCase, match: TensorMatch) -> bool:
    """Whether the bytes are what a right encoder makes of the reference's values: then no row is strange, short as it may be."""
    assert match.of is not None
    assert match.kind is not None
    try:
        return np.array_equal(case.healthy(match.of, match.kind).raw, match.piece.raw)
    except AprlabError:
        return False


def made_apart(match: TensorMatch, evidence: dict[str, Any]) -> bool:
    """Whether most rows lost more than a re-encoding of the reference's values loses: then the file's were never those.

    Such a file was made from what the reference was made from. Floats of 16 bits keep their own bound, which has both.
    """
    of, kind, rows = match.of, match.kind, match.rows
    assert of is not None
    assert kind is not None
    assert rows is not None
    if not of.type.quantised:  # the reference is a source, or as good as one
        return False
    own = evidence.get("ggml_rel_l2") or _usual(kind)
    return float(np.median(rows.relative)) > _APART * own


def strange_rows(match: TensorMatch) -> np.ndarray:
    """Rows that are not the reference's within what the types may lose, int64: too far off, or with another scale or offset.

    Raises:
        UnsupportedError: no bound is known for a type.
    """
    of, kind, rows = match.of, match.kind, match.rows
    assert of is not None
    assert kind is not None
    assert rows is not None
    found = (beyond_both if match.apart else beyond)(rows, of.type, kind)
    if not match.apart and {of.type, kind} & set(FLOATS) and kind in FLOATS:
        return found  # every single value was compared
    return np.union1d(found, tilted(rows))


def _usual(kind: TensorType) -> float:
    """What a type usually loses, where its encoder is not at hand: half of what it loses at worst."""
    return LOST[kind.name] / 2 if kind.name in LOST else ROUNDED[kind][0] if kind in ROUNDED else 0.0


def _measured_apart(match: TensorMatch) -> dict[str, Any]:
    """What two encodings of one source lose together: as measured on a few rows, and the bound of a row."""
    of, kind = match.of, match.kind
    assert of is not None
    assert kind is not None
    got, expected = sample(match.piece.raw, kind, of.shape), reference_sample(of)
    both = []
    for values, type_ in ((expected, kind), (got, of.type)):
        own = None if values is None else own_loss(values, type_)
        both.append(max(_usual(type_), own or 0.0))  # values that are on a grid already lose less than their source did
    assert match.rows is not None
    usual = math.hypot(*both)
    limits = [value_bound(type_) for type_ in (of.type, kind)]
    return {
        "bound_of_a_row": sum(limits), "both_lose": usual,
        "worse_than_both": match.rows.rel_l2 / usual if usual else float("inf"),
    }  # fmt: skip


def value_bound(kind: TensorType) -> float:
    """Largest relative l2 error of a row that its type explains; AprQ8's depends on the whole tensor and counts as 0."""
    return LOST[kind.name] * MARGIN if kind.name in LOST else ROUNDED[kind][0] if kind in ROUNDED else 0.0


def _measured(case: FileCase, match: TensorMatch) -> dict[str, Any]:
    """What holding a tensor in another type cost, over all rows, and what ggml's encoder would have cost on a few."""
    rows, kind = match.rows, match.kind
    assert rows is not None
    assert kind is not None
    evidence = loss(case, match) or {}
    if not can_encode(kind):
        evidence = {}
    evidence |= {"rel_l2": rows.rel_l2, "worst_row_rel_l2": float(rows.relative.max(initial=0)), "rows": rows.rows}
    if kind.name in LOST:
        evidence["bound_of_a_row"] = LOST[kind.name] * MARGIN
    return evidence


def encoded_again(match: TensorMatch) -> bool:
    """Whether the bytes are what the reference's values give when they are encoded in their own type once more."""
    of, raw = match.of, match.piece.raw
    assert of is not None
    if not (of.type.quantised and can_encode(of.type) and of.type.fits(of.shape, len(raw))) or of.type.tensor_bytes:
        return False
    step, size = max(1, (1 << 18) // of.cols), of.type.row_bytes(of.cols)
    try:
        for start, stop in [(0, _FIRST), *((n, n + step) for n in range(0, of.rows, step))]:
            rows = slice(start, min(stop, of.rows))
            values = of.dequantise(rows if len(of.shape) > 1 else None).reshape(-1, of.cols)
            if not np.array_equal(quantise(values, of.type).reshape(-1), raw[start * size : rows.stop * size]):
                return False
    except AprlabError:
        return False
    return True


def rounded(match: TensorMatch) -> Mechanism | None:
    """A code for floats of which one side's are the other's, rounded to 16 bits, to the last bit; None where they are not.

    A model that went through a BF16 or F16 file has lost bits that way, and is the same model; so is one whose blocks were
    decoded, rounded and kept as F32.
    """
    of, kind = match.of, match.kind
    if of is None or kind not in FLOATS or len(match.piece.raw) != kind.nbytes(of.shape):
        return None
    if of.type not in FLOATS and (kind is not F32 or not of.type.quantised):
        return None
    held = Tensor(of.name, kind, of.shape, match.piece.raw, of.origin)
    step = max(1, (1 << 20) // max(of.cols, 1)) if len(of.shape) > 1 else None
    parts = [slice(n, n + step) for n in range(0, of.rows, step)] if step is not None else [None]
    for narrow in (BF16, F16):
        for code, coarser, finer in (("dtype.file-rounded", held, of), ("dtype.reference-rounded", of, held)):
            if coarser.type not in FLOATS:
                continue  # blocks round otherwise
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


def labelled_reversed(match: TensorMatch) -> TensorType | None:
    """Without a reference: the type in the label of a matrix that obeys the size law with its dims in reverse, and only so."""
    p = match.piece
    if match.of is not None or len(p.shape) != 2 or p.fitting():
        return None
    return lawful(p.code, p.shape[::-1], p.size)


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
        if (exact := rounded_vector(match)) is not None:
            match.kind = exact
            return
        options = kinds_for(p, match.of)
        expected = reference_sample(match.of)
        scores: dict[TensorType, float] = {}
        for kind in options:
            values = sample(p.raw, kind, match.of.shape)
            scores[kind] = 0.0 if values is None or expected is None else correlation(values, expected)
        best = max(scores, key=lambda kind: scores[kind], default=None)
        label = lawful(p.code, match.of.shape, p.size)
        if best is not None and label in FLOATS and scores.get(label, 0) > scores[best] - _AS_GOOD:
            best = label  # values all near one constant, as a norm's, are alike under every type
        if best is not None and scores[best] > ALIKE:
            match.kind, match.correlation = best, scores[best]
            return
        ranked = sorted(scores.values(), reverse=True)
        if best is not None and ranked[0] > _LIKER and (len(ranked) == 1 or ranked[0] - ranked[1] > _LIKER):
            match.kind, match.correlation = best, scores[best]  # changed values, and still those of one type only
            return
        if p.code in types.FOREIGN:
            return  # known by name, and like nothing that can be decoded here: no guess
        # The values are nobody's: then the label if it is lawful and not absurd, what they look like, or the reference's.
        looks, match.looks = by_looks(p.raw, match.of.shape, options, label)
        likely = [t for t in (looks, label) if t is not None] or [t for t in options if t is match.of.type]
        likely = likely or (options if len(options) == 1 else [])
        match.kind = likely[0] if likely else None
        match.correlation = None if match.kind is None else scores[match.kind]
        match.open_kinds = tuple(options)
        return
    if p.code in types.FOREIGN:
        return
    options = [t for t in LIKELY if t.fits(p.shape, p.size)]
    # A lawful label may be wrong: Q4_K, Q4_0 and AprQ4 have one density. It stands unless its reading is absurd.
    label = lawful(p.code, p.shape, p.size)
    looks, match.looks = by_looks(p.raw, p.shape, options, label)
    if (kind_ := labelled_reversed(match)) is not None:
        match.kind = kind_
    elif looks is not None:
        match.kind, match.open_kinds = looks, tuple(options)
    elif label is not None:
        match.kind = label
    elif len(options) == 1:
        match.kind = options[0]
    else:
        match.open_kinds = tuple(options)


def rounded_vector(match: TensorMatch) -> TensorType | None:
    """The float type, the label's first, that a float vector of the reference was rounded to, to the last bit; None for none."""
    p, of = match.piece, match.of
    if of is None or len(of.shape) != 1 or of.type not in FLOATS:
        return None
    for kind in [kind for kind in kinds_for(p, of) if kind in FLOATS]:
        try:
            if np.array_equal(quantise(of.dequantise(), kind).reshape(-1), p.raw):
                return kind
        except NumericError:
            continue  # too large for F16, or not finite
    return None


def lawful(code: int, shape: tuple[int, ...], size: int) -> TensorType | None:
    """The one type that a label stands for by the size law; None where it is none, or several."""
    found = [t for t in apr.candidates(code) if t.fits(shape, size)]
    return found[0] if len(found) == 1 else None


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


def own_loss(values: np.ndarray, kind: TensorType) -> float | None:
    """Relative l2 error that ggml's encoder makes on these rows, float32 (rows, cols); None where that cannot be measured."""
    if not can_encode(kind) or kind.tensor_bytes:
        return None
    try:
        again = dequantise(quantise(values, kind), kind, values.shape)
    except AprlabError:
        return None
    norm = float(np.linalg.norm(values.astype(np.float64))) or 1.0
    return float(np.linalg.norm(values.astype(np.float64) - again.astype(np.float64))) / norm


def loss(case: FileCase, match: TensorMatch) -> dict[str, Any] | None:
    """What holding a tensor in another type costs: relative l2 error of sampled rows, against ggml's own encoder."""
    assert match.of is not None
    assert match.kind is not None
    expected, got = reference_sample(match.of), sample(match.piece.raw, match.kind, match.of.shape)
    if expected is None or got is None:
        return None
    norm = float(np.linalg.norm(expected.astype(np.float64))) or 1.0
    error = float(np.linalg.norm(expected.astype(np.float64) - got.astype(np.float64))) / norm
    own = own_loss(expected, match.kind) or 0.0
    if match.kind is types.APR_Q8:
        whole = case.healthy(match.of, match.kind)
        again_ = sample(whole.raw, match.kind, match.of.shape)
        own = 0.0 if again_ is None else float(np.linalg.norm(expected.astype(np.float64) - again_.astype(np.float64))) / norm
    ratio = 0.0 if error == 0 else error / own if own else float("inf")
    if own == 0 and error < 1e-6:
        ratio = 0.0  # the last bit of a float type
    return {"rel_l2": error, "ggml_rel_l2": own, "worse_than_ggml": ratio}
