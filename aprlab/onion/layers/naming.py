"""Names: what a tensor is called, and what it is by content."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from aprlab.formats import apr
from aprlab.formats.raw import Piece
from aprlab.model import names
from aprlab.model.config import LAYERS_LIMIT
from aprlab.model.content import drop_pages
from aprlab.model.tensor import Tensor
from aprlab.onion.layers.base import Case, Deviation, Layer, Match, correlation, sample
from aprlab.quants import types
from aprlab.quants.types import TensorType

_ALIKE = 0.8  # correlation of decoded values from which on two tensors are one; unrelated weights stay below 0.1


class Naming(Layer):
    """Which tensor is which. Content first: a hash finds a tensor under another's name."""

    name: ClassVar[str] = "naming"

    def suspect(self, case: Case) -> list[Deviation]:
        case.matches = match_up(case)
        found: list[Deviation] = []
        twice: dict[str, int] = {}
        for match in case.matches:
            p, true = match.piece, match.true
            if true is None:
                known = p.stated or p.name
                again = twice.get(p.name, 0) or any(m.piece.name == p.name for m in case.matches if m is not match)
                how = "a tensor stands in the index twice" if again else "a tensor that no Qwen2 model has"
                found.append(Deviation("container" if again else "naming", "extra", known, p.name, None, how, match))
                continue
            due = case.due_name(true)
            if p.name == due:
                continue
            how, evidence = self._how(case, match)
            found.append(Deviation("naming", "name", true, p.name, due, how, match, {**evidence, "found_by": match.by}))
        found += self._missing(case)
        return found

    def _how(self, case: Case, match: Match) -> tuple[str, dict[str, object]]:
        p, true = match.piece, match.true
        assert true is not None
        if p.stated == true:
            return f"names of the {p.naming!r} generation, where {case.seen.dialect.naming!r} ones are wanted", {}
        if p.stated is None:
            return "content under a name that no Qwen2 model has", {}
        a, b = names.template_of(true), names.template_of(p.stated)
        if a == b:
            i, j = sorted((true.split(".")[1], p.stated.split(".")[1]), key=int)
            return f"content of layers {i} and {j} under each other's number", {}
        part = sorted(t.replace("blk.N.", "").rpartition(".")[0] for t in (a, b))
        return f"content of {part[0]} and {part[1]} under each other's name", {}

    def _missing(self, case: Case) -> list[Deviation]:
        have = {m.true for m in case.matches}
        if case.ref is not None:
            due: dict[str, Tensor | None] = dict(case.ref.tensors)
        else:
            layers = case.seen.config["block_count"]
            layers = layers if isinstance(layers, int) and 0 < layers <= LAYERS_LIMIT else 0
            due = dict.fromkeys(names.inventory(layers, separate_output=False))
        fused = [m for m in case.matches if m.true is None]
        found = []
        for name, tensor in due.items():
            if name in have:
                continue
            kind = "Q, K and V biases are" if name.endswith(".bias") else "tensors are"
            d = Deviation("naming", "missing", name, None, tensor, f"{kind} not in the file")
            if tensor is not None and (inside := _inside(tensor, fused)) is not None:
                d.evidence["its_bytes_stand_in"] = inside
            found.append(d)
        return found


def _inside(tensor: Tensor, others: list[Match]) -> str | None:
    """Name of a tensor nobody knows that holds all bytes of `tensor` in a row."""
    wanted = tensor.raw.tobytes()
    for match in others:
        if len(wanted) < match.piece.size <= 1 << 20 and any(wanted) and wanted in match.piece.raw.tobytes():
            return match.piece.name
    return None


def match_up(case: Case) -> list[Match]:
    """Every piece with the tensor that it is: by content, else by decoded values, else by name."""
    pieces, ref = case.seen.pieces, case.ref
    if ref is None:
        first: dict[str, bool] = {}
        out = []
        for p in pieces:
            known = p.stated is not None and not first.get(p.name)
            first[p.name] = True
            out.append(Match(p, p.stated if known else None, None, "name"))
        return out
    found: dict[int, Match] = {}
    claimed: set[str] = set()

    def claim(n: int, name: str, by: str, *, equal: bool = False, value: float | None = None) -> None:
        found[n] = Match(pieces[n], name, ref.tensors[name], by, equal=equal, correlation=value)
        claimed.add(name)

    for n, p in enumerate(pieces):
        if p.stated in ref.tensors and p.stated not in claimed and _same_bytes(p, ref.tensors[p.stated]):
            claim(n, p.stated, "content", equal=True)
    open_ = [n for n in range(len(pieces)) if n not in found]
    if open_:
        for n in open_:
            others = [name for name in ref.by_hash.get(pieces[n].hash, []) if name not in claimed]
            if others:
                claim(n, _nearest(pieces[n], others), "content", equal=True)
        shift = 0
        for n in [n for n in open_ if n not in found]:
            p = pieces[n]
            if p.stated in ref.tensors and p.stated not in claimed and case.seen.box is not None:
                place = beside(case.seen.box, p, ref.tensors[p.stated], shift)
                if place is not None:
                    claim(n, p.stated, "span")
                    found[n].place, shift = place, place - p.start
        if shift and case.seen.box is not None and 2 * sum(m.by == "span" for m in found.values()) > len(pieces) - len(claimed):
            # Most stand `shift` bytes beside: then so do those whose bytes were changed besides.
            for n in [n for n in open_ if n not in found]:
                moved, image = pieces[n].start + shift, case.seen.box.image
                if 0 <= moved <= len(image) - pieces[n].size:
                    pieces[n].raw, pieces[n].place = image[moved : moved + pieces[n].size], moved
    open_ = [n for n in open_ if n not in found]
    looks = {n: _Looks(pieces[n], ref.tensors) for n in open_}
    for n in list(open_):
        name = pieces[n].stated
        if name is not None and name in ref.tensors and name not in claimed and (value := looks[n].score(name)) > _ALIKE:
            claim(n, name, "name", value=value)
    for n in [n for n in open_ if n not in found]:
        scores = {name: looks[n].score(name) for name in ref.tensors if name not in claimed}
        best = max(scores, key=lambda name: scores[name], default=None)
        if best is not None and scores[best] > _ALIKE:
            claim(n, best, "values", value=scores[best])
    rule = _Rule([m for m in found.values() if m.by in ("content", "values")])
    for n in [n for n in open_ if n not in found]:
        ruled = rule(pieces[n].stated)
        if ruled in ref.tensors and ruled not in claimed and ref.tensors[ruled].size == int(np.prod(pieces[n].shape)):
            claim(n, ruled, "rule")
    for n in [n for n in open_ if n not in found]:
        name = pieces[n].stated
        if name in ref.tensors and name not in claimed and (other := _by_size(pieces[n], ref.tensors, claimed)) is not None:
            claim(n, other, "shape")
    for n in [n for n in open_ if n not in found]:
        name = pieces[n].stated
        if name is not None and name in ref.tensors and name not in claimed:
            claim(n, name, "name")
        else:
            found[n] = Match(pieces[n], None, None, "nothing")
    for n, match in found.items():
        match.place = pieces[n].place if match.place is None else match.place
    return [found[n] for n in range(len(pieces))]


class _Rule:
    """What the tensors that were found tell about the names of the others: modules or layers that all went elsewhere.

    A vector of zeros has no content to be found by; but where a module's weight stands under another's name, so does
    its bias.
    """

    def __init__(self, matches: list[Match]) -> None:
        self.modules: dict[str, set[str]] = {}
        self.layers: dict[str, set[str]] = {}
        for m in matches:
            stated, true = (m.piece.stated or "").split("."), (m.true or "").split(".")
            if len(stated) == len(true) == 4:
                (_, layer, module, _), (_, true_layer, true_module, _) = stated, true
                self.modules.setdefault(module, set()).add(true_module)
                self.layers.setdefault(layer, set()).add(true_layer)

    def __call__(self, stated: str | None) -> str | None:
        """Where a tensor of this name belongs, if all others of its module and layer agree and it is not where it says."""
        if stated is None or not stated.startswith("blk."):
            return None
        _, layer, module, sort = stated.split(".")
        modules, layers = self.modules.get(module, {module}), self.layers.get(layer, {layer})
        if len(modules) > 1 or len(layers) > 1 or (modules, layers) == ({module}, {layer}):
            return None
        return f"blk.{next(iter(layers))}.{next(iter(modules))}.{sort}"


def beside(box: apr.Container, piece: Piece, tensor: Tensor, first: int, reach: int = 4096) -> int | None:
    """Where a tensor's bytes stand in the file, if not where the index says: `first` bytes beside, or within `reach`."""
    wanted, start, image = tensor.raw, piece.start, box.image
    if len(wanted) != piece.size:
        return None
    head, near = wanted[:64], [first] if first else []
    low = max(0, start - reach)
    window = image[low : start + reach + len(head)]
    if len(window) >= len(head) and head.any():
        places = np.flatnonzero(window[: len(window) - len(head) + 1] == head[0])
        near += [low + int(p) - start for p in places if np.array_equal(window[p : p + len(head)], head)]
    for shift in near:
        place = start + shift
        if place >= 0 and place + len(wanted) <= len(image) and np.array_equal(image[place : place + len(wanted)], wanted):
            return place
    return None


def _by_size(piece: Piece, tensors: dict[str, Tensor], claimed: set[str]) -> str | None:
    """The one open tensor of the same layer and sort that has this size, where the one it is called by has another."""
    size, name = int(np.prod(piece.shape)), piece.stated or ""
    if tensors[name].size == size:
        return None
    layer, sort = name.rpartition(".")[0].rpartition(".")[0], name.rpartition(".")[2]
    alike = [
        n for n, t in tensors.items() if n not in claimed and n.startswith(f"{layer}.") and n.endswith(sort) and t.size == size
    ]
    return alike[0] if len(alike) == 1 else None


def _same_bytes(piece: Piece, tensor: Tensor) -> bool:
    if len(piece.raw) != len(tensor.raw):
        return False
    step = 1 << 22  # what was looked at need not stay in memory: a pair of files may be larger than it
    for start in range(0, len(tensor.raw), step):
        a, b = piece.raw[start : start + step], tensor.raw[start : start + step]
        if not np.array_equal(a, b):
            return False
        if len(a) == step:
            drop_pages(a)
            drop_pages(b)
    drop_pages(piece.raw)
    return True


def _nearest(piece: Piece, others: list[str]) -> str:
    """Of several tensors with the same content (norms of ones, zero biases), the one nearest by name."""
    if piece.stated is not None:
        same = [name for name in others if names.template_of(name) == names.template_of(piece.stated)]
        layer = [name for name in others if name.split(".")[:2] == piece.stated.split(".")[:2]]
        return (same or layer or others)[0]
    return others[0]


class _Looks:
    """Decoded rows of a piece under every type its size allows, against rows of the reference's tensors."""

    def __init__(self, piece: Piece, tensors: dict[str, Tensor]) -> None:
        self.piece, self.tensors = piece, tensors
        self.scores: dict[str, float] = {}
        self.samples: dict[tuple[TensorType, tuple[int, ...]], np.ndarray | None] = {}

    def score(self, name: str) -> float:
        """Largest correlation with the tensor `name`, over all types that fit."""
        if name not in self.scores:
            tensor, best = self.tensors[name], 0.0
            if int(np.prod(self.piece.shape)) == tensor.size:
                due = reference_sample(tensor)
                for kind in kinds_for(self.piece, tensor):
                    key = (kind, tensor.shape)
                    if key not in self.samples:
                        self.samples[key] = sample(self.piece.raw, kind, tensor.shape)
                    values = self.samples[key]
                    if values is not None and due is not None:
                        best = max(best, correlation(values, due))
            self.scores[name] = best
        return self.scores[name]


_SAMPLES: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}


def reference_sample(tensor: Tensor) -> np.ndarray | None:
    """Decoded rows of a reference's tensor, remembered while its bytes live."""
    kept = _SAMPLES.get(id(tensor.raw))
    if kept is None or kept[0] is not tensor.raw:
        if len(_SAMPLES) > 4096:
            _SAMPLES.clear()
        kept = _SAMPLES[id(tensor.raw)] = (tensor.raw, sample(tensor.raw, tensor.type, tensor.shape))
    return kept[1]


def kinds_for(piece: Piece, tensor: Tensor) -> list[TensorType]:
    """Types the bytes can be by the size law, the reference's own and the labelled ones first."""
    label = [t for t in apr.candidates(piece.code) if t.fits(tensor.shape, piece.size)]
    own = [tensor.type] if tensor.type.fits(tensor.shape, piece.size) else []
    rest = [t for t in LIKELY if t.fits(tensor.shape, piece.size)]
    return list(dict.fromkeys([*own, *label, *rest]))


# Types a Qwen2 file is met in; what nobody here can decode is not among them.
LIKELY: tuple[TensorType, ...] = (
    types.F32, types.F16, types.BF16, types.Q8_0, types.Q4_K, types.Q5_K, types.Q6_K, types.Q4_0, types.Q4_1, types.Q5_0,
    types.Q5_1, types.Q3_K, types.Q2_K, types.APR_Q4, types.APR_Q8,
)  # fmt: skip
