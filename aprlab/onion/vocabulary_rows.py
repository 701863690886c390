"""More or fewer rows of vocabulary than the reference has: the same model, where they only pad.

Programs cut the rows behind the last token off, or add some up to a round number. The reference is then cut, or given the
file's own rows; a finding names the rows and the tokens, and everything else is compared as ever. The file stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aprlab.errors import BROKEN
from aprlab.formats.raw import Piece, Reference, Seen
from aprlab.model.tensor import Tensor
from aprlab.model.vocabulary import NORMAL, UNUSED
from aprlab.onion.verdict import Finding
from aprlab.onion.words import Mechanism
from aprlab.quants import dequantise, quantise, types
from aprlab.quants.types import TensorType

_ROWS = ("token_embd.weight", "output.weight")  # tensors with a row for each token
_SHOWN = 8  # tokens that a finding names
_STEP = 4096  # rows that are decoded at a time


def aligned(file: Seen, reference: Reference) -> tuple[Reference, list[Finding]]:
    """The reference to compare with, and what is said of rows that one side alone has.

    Nothing is changed unless both vocabularies begin alike, the file has a row for each of its tokens, and none of the rows
    belongs to a token that text is made of.
    """
    data = reference.model.tokenizer
    tokens, kinds = file.tokenizer["tokens"], file.tokenizer["token_types"]
    if not isinstance(tokens, list) or not isinstance(kinds, list) or len(tokens) != len(kinds):
        return reference, []
    rows, expected = len(tokens), len(data.tokens)
    common = min(rows, expected)
    alike = tokens[:common] == data.tokens[:common] and kinds[:common] == data.token_types[:common]
    pieces = {p.stated: p for p in file.pieces if p.stated is not None and p.stated in _ROWS}
    if rows == expected or not alike or not common or not _has_rows(pieces, reference.tensors, rows, expected):
        return reference, []
    longer, longer_kinds = (tokens, kinds) if rows > expected else (data.tokens, data.token_types)
    ids = (data.bos_token_id, data.eos_token_id, data.pad_token_id) if rows < expected else ()
    if NORMAL in longer_kinds[common:] or any(id is not None and id >= common for id in ids):
        return reference, []
    harmless = all(kind == UNUSED for kind in longer_kinds[common:])
    evidence: dict[str, Any] = {"rows": rows, "expected_rows": expected}
    if rows > expected:
        largest = _norms(pieces, expected)
        if largest is not None:
            evidence["largest_norm_of_these_rows"], evidence["of_the_others"] = largest
            harmless = harmless and largest[0] <= 2 * largest[1]
    fitted = _fitted(reference, pieces, rows, longer[:rows], longer_kinds[:rows])
    if fitted is None:
        return reference, []
    reference = fitted
    figures = {"count": abs(rows - expected), "first": common, "last": len(longer) - 1, "tokens": longer[common:][:_SHOWN]}
    cause = Mechanism("tokenizer.rows-more" if rows > expected else "tokenizer.rows-fewer", figures)
    return reference, [Finding("tokenizer", None, [n for n in _ROWS if n in pieces], cause, evidence, harmless=harmless)]


def _has_rows(pieces: dict[str, Piece], tensors: dict[str, Tensor], rows: int, expected: int) -> bool:
    """Whether both sides have these tensors, with a row for each token on each side."""
    names = [name for name in _ROWS if name in tensors]
    return (
        _ROWS[0] in names
        and set(names) == set(pieces)
        and all(tensors[n].shape[0] == expected and pieces[n].shape == (rows, *tensors[n].shape[1:]) for n in names)
        and all(_kind(pieces[n]) is not None for n in names)
    )


def _kind(piece: Piece) -> TensorType | None:
    """The type of the label, where the bytes are as many as it demands."""
    kind = types.lawful(piece.code)
    return kind if kind is not None and kind.fits(piece.shape, len(piece.raw)) and not kind.tensor_bytes else None


def _fitted(
    reference: Reference, pieces: dict[str, Piece], rows: int, tokens: list[str], kinds: list[int]
) -> Reference | None:  # fmt: skip
    """The reference with `rows` rows of vocabulary; those that it lacks are the file's, None where they cannot be had."""
    model, tensors = reference.model, dict(reference.tensors)
    for name in pieces:
        whole = tensors[name]
        shape = (rows, *whole.shape[1:])
        if rows <= whole.shape[0]:
            raw = whole.raw[: whole.type.nbytes(shape)]
        elif (more := _rows_as(pieces[name], whole.shape[0], whole.type)) is not None:
            raw = np.concatenate([whole.raw, more])
        else:
            return None
        tensors[name] = Tensor(name, whole.type, shape, raw, whole.origin)
    data = replace(model.tokenizer, tokens=tokens, token_types=kinds)
    config = replace(model.config, vocab_size=rows)
    return Reference(model.with_changes(tensors=tensors, config=config, tokenizer=data))


def _rows_as(piece: Piece, first: int, kind: TensorType) -> np.ndarray | None:
    """The rows of a piece from `first` on, in another type's bytes where it has to be, ``uint8 (n,)``."""
    own = _kind(piece)
    assert own is not None
    raw = piece.raw[first * own.row_bytes(piece.shape[-1]) :]
    if own is kind:
        return raw
    try:
        values = dequantise(raw, own, (piece.shape[0] - first, piece.shape[-1]))
        return quantise(values, kind).reshape(-1)
    except BROKEN:
        return None


def _norms(pieces: dict[str, Piece], first: int) -> tuple[float, float] | None:
    """Largest l2 norm of the head's rows from `first` on, and of those before; None where they cannot be decoded.

    A row that only pads has a small one: a large one would win against every token.
    """
    piece: Piece = pieces.get("output.weight") or pieces[_ROWS[0]]
    kind = _kind(piece)
    assert kind is not None
    step = kind.row_bytes(piece.shape[-1])
    found: list[float] = []
    for low, high in ((first, piece.shape[0]), (0, first)):
        largest = 0.0
        for at in range(low, high, _STEP):
            some = min(_STEP, high - at)
            try:
                values = dequantise(piece.raw[at * step : (at + some) * step], kind, (some, piece.shape[-1]))
            except BROKEN:
                return None
            with np.errstate(all="ignore"):
                norms: Sequence[float] = np.sqrt((values.astype(np.float64) ** 2).sum(axis=1))
            largest = max(largest, float(np.max(norms))) if np.isfinite(norms).all() else float("inf")
        found.append(largest)
    return found[0], found[1]


__all__ = ["aligned"]
