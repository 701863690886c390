"""Which tensor of the reference each piece of a file is: by content, by decoded values, by a rule, by name last."""

from __future__ import annotations

import itertools
from functools import cached_property

import numpy as np

from aprlab.errors import NumericError
from aprlab.formats import apr
from aprlab.formats.raw import Piece, Reference, Seen
from aprlab.model import names
from aprlab.model.content import drop_pages
from aprlab.model.tensor import Tensor
from aprlab.onion.file_case import FileCase, TensorMatch
from aprlab.onion.looks import FLOATS
from aprlab.onion.samples import ALIKE, SampledValues, correlation, kinds_for, reference_sample, sample
from aprlab.quants import quantise
from aprlab.quants.types import TensorType

_NEAREST = 4096  # tensors of one content that are looked at for the one with the nearest name
_COMPARED = 4  # values from which on a correlation says anything


def match_up(case: FileCase) -> list[TensorMatch]:
    """Every piece with the tensor that it is, in the order of the index; `FileMatcher` says how."""
    return _by_name_alone(case.file.pieces) if case.ref is None else FileMatcher(case.file, case.ref).match()


def _by_name_alone(pieces: list[Piece]) -> list[TensorMatch]:
    """Without a reference a name is all there is; of two pieces of one name, the first has it."""
    met: set[str] = set()
    found = []
    for p in pieces:
        known = p.stated is not None and p.name not in met
        met.add(p.name)
        found.append(TensorMatch(p, p.stated if known else None, None, "name"))
    return found


class FileMatcher:
    """Gives each piece of a file a tensor of the reference, each tensor once, the surest ways first."""

    def __init__(self, file: Seen, ref: Reference) -> None:
        self.pieces, self.box, self.ref = file.pieces, file.box, ref
        self.found: dict[int, TensorMatch] = {}
        self.claimed: set[str] = set()

    def match(self) -> list[TensorMatch]:
        """All ways, one after the other; what is left matches nothing."""
        self._by_own_content()
        if self.open:
            self._by_content()
            self._by_rounded_content()
            self._by_span()
        expected: dict[str, SampledValues | None] = {}
        looks = {n: _Looks(self.pieces[n], self.ref.tensors, expected) for n in self.open}
        self._by_own_values(looks)
        self._by_values(looks)
        self._by_rule()
        self._by_size()
        for n in self.open:
            name = self.own(n)
            if name is not None:
                self.claim(n, name, "name")
            elif (name := self._left_over(n)) is not None:
                self.claim(n, name, "rule")
            else:
                self.found[n] = TensorMatch(self.pieces[n], None, None, "nothing")
        for n, match in self.found.items():
            match.place = self.pieces[n].place if match.place is None else match.place
        return [self.found[n] for n in range(len(self.pieces))]

    def _left_over(self, n: int) -> str | None:
        """The one tensor of a kind that no piece is yet, for a copy of another tensor of that kind whose own name is taken.

        Where the parts of several layers moved on by one, the first is left with a copy, and the last is nobody.
        """
        piece = self.pieces[n]
        if piece.stated not in self.claimed or piece.hash not in self.ref.by_hash:
            return None
        kind = names.template_of(piece.stated)
        free = [name for name in self._free_of_kind.get(kind, []) if name not in self.claimed]
        return free[0] if len(free) == 1 and self._called[piece.stated] != piece.stated else None

    @cached_property
    def _free_of_kind(self) -> dict[str, list[str]]:
        """Template -> tensors that were free when this was first asked."""
        found: dict[str, list[str]] = {}
        for name in self.ref.tensors:
            if name not in self.claimed:
                found.setdefault(names.template_of(name), []).append(name)
        return found

    @cached_property
    def _called(self) -> dict[str | None, str | None]:
        """Tensor -> what the piece that it is was called, when this was first asked."""
        return {m.true: m.piece.stated for m in self.found.values()}

    @property
    def open(self) -> list[int]:
        """Pieces without a tensor."""
        return [n for n in range(len(self.pieces)) if n not in self.found]

    def own(self, n: int) -> str | None:
        """The tensor that a piece is called by, if there is one and it is still free."""
        name = self.pieces[n].stated
        return name if name in self.ref.tensors and name not in self.claimed else None

    def claim(self, n: int, name: str, by: str, *, equal: bool = False, value: float | None = None) -> None:
        """Piece `n` is the tensor `name`."""
        self.found[n] = TensorMatch(self.pieces[n], name, self.ref.tensors[name], by, equal=equal, correlation=value)
        self.claimed.add(name)

    def _by_own_content(self) -> None:
        for n, piece in enumerate(self.pieces):
            name = self.own(n)
            if name is not None and _same_bytes(piece, self.ref.tensors[name]):
                self.claim(n, name, "content", equal=True)

    def _by_content(self) -> None:
        free = {key: dict.fromkeys(n for n in same if n not in self.claimed) for key, same in self.ref.by_hash.items()}
        for n in self.open:
            others = free.get(self.pieces[n].hash, {})
            if others:
                # Thousands of tensors may share one content: the nearest of a few is near enough.
                name = _nearest(self.pieces[n], list(itertools.islice(others, _NEAREST)))
                del others[name]
                self.claim(n, name, "content", equal=True)

    def _by_rounded_content(self) -> None:
        """Vectors held as another float type than the reference's, to the last bit: two layers' are too alike for less."""
        vectors: dict[tuple[TensorType, int], dict[bytes, list[str]]] = {}
        own: dict[int, set[str]] = {}
        for n in self.open:
            piece = self.pieces[n]
            if len(piece.shape) != 1 or len(piece.raw) < piece.size:
                continue
            for kind in (kind for kind in FLOATS if kind.fits(piece.shape, piece.size)):
                key = (kind, piece.shape[0])
                if key not in vectors:
                    vectors[key] = self._rounded_vectors(*key)
                own.setdefault(n, set()).update(vectors[key].get(piece.raw.tobytes(), ()))
        for mine in (True, False):
            for n in own:
                free = [name for name in own[n] if name not in self.claimed] if n not in self.found else []
                if mine and self.own(n) in free:
                    self.claim(n, str(self.own(n)), "values", value=1.0)
                elif free and not mine:
                    self.claim(n, _nearest(self.pieces[n], sorted(free)), "values", value=1.0)

    def _rounded_vectors(self, kind: TensorType, size: int) -> dict[bytes, list[str]]:
        """Bytes as `kind` -> the float vectors of the reference of so many values that become them; its own type apart."""
        found: dict[bytes, list[str]] = {}
        for name, tensor in self.ref.tensors.items():
            if tensor.shape != (size,) or tensor.type not in FLOATS or tensor.type is kind:
                continue
            try:
                found.setdefault(quantise(tensor.dequantise(), kind).tobytes(), []).append(name)
            except NumericError:
                continue  # too large for F16, or not finite
        return found

    def _by_span(self) -> None:
        """The right bytes are a little before or after the place that the index names."""
        if self.box is None:
            return
        shift = 0
        for n in self.open:
            piece, name = self.pieces[n], self.own(n)
            if name is None:
                continue
            place = place_near(self.box, piece, self.ref.tensors[name], shift)
            if place is not None:
                self.claim(n, name, "span")
                self.found[n].place, shift = place, place - piece.start
        moved = sum(match.by == "span" for match in self.found.values())
        if not shift or 2 * moved <= len(self.pieces) - len(self.claimed):
            return
        # Most are `shift` bytes off: then so are those whose bytes were changed as well.
        for n in self.open:
            start, image = self.pieces[n].start + shift, self.box.image
            if 0 <= start <= len(image) - self.pieces[n].size:
                self.pieces[n].raw, self.pieces[n].place = image[start : start + self.pieces[n].size], start

    def _by_own_values(self, looks: dict[int, _Looks]) -> None:
        for n in self.open:
            name = self.own(n)
            if name is not None and (value := looks[n].score(name)) > ALIKE:
                self.claim(n, name, "name", value=value)

    def _by_values(self, looks: dict[int, _Looks]) -> None:
        sizes: dict[int, list[str]] = {}
        for name, tensor in self.ref.tensors.items():
            if name not in self.claimed and tensor.size >= _COMPARED:
                sizes.setdefault(tensor.size, []).append(name)
        for n in self.open:
            alike = sizes.get(int(np.prod(self.pieces[n].shape)), [])
            scores = {name: looks[n].score(name) for name in alike if name not in self.claimed}
            best = max(scores, key=lambda name: scores[name], default=None)
            if best is not None and scores[best] > ALIKE:
                self.claim(n, best, "values", value=scores[best])

    def _by_rule(self) -> None:
        """As the tensors that were found tell about the others of their module or layer."""
        rule = _RenamingRule([m for m in self.found.values() if m.by in ("content", "values")])
        for n in self.open:
            name = rule.place_of(self.pieces[n].stated)
            free = name in self.ref.tensors and name not in self.claimed
            if free and name is not None and self.ref.tensors[name].size == int(np.prod(self.pieces[n].shape)):
                self.claim(n, name, "rule")

    def _by_size(self) -> None:
        for n in self.open:
            if self.own(n) is not None:
                other = _by_size(self.pieces[n], self.ref.tensors, self.claimed)
                if other is not None:
                    self.claim(n, other, "shape")


class _RenamingRule:
    """What the tensors that were found tell about the names of the others: modules or layers that all went elsewhere.

    A vector of zeros has no content to be found by; but where a module's weight stands under another's name, so does
    its bias.
    """

    def __init__(self, matches: list[TensorMatch]) -> None:
        self.modules: dict[str, set[str]] = {}
        self.layers: dict[str, set[str]] = {}
        for m in matches:
            stated, true = (m.piece.stated or "").split("."), (m.true or "").split(".")
            if len(stated) == len(true) == 4:
                (_, layer, module, _), (_, true_layer, true_module, _) = stated, true
                self.modules.setdefault(module, set()).add(true_module)
                self.layers.setdefault(layer, set()).add(true_layer)

    def place_of(self, stated: str | None) -> str | None:
        """Where a tensor of this name belongs, if all others of its module and layer agree and it is not where it says."""
        if stated is None or not stated.startswith("blk."):
            return None
        parts = stated.split(".")
        if len(parts) != 4:  # of another architecture
            return None
        _, layer, module, sort = parts
        modules, layers = self.modules.get(module, {module}), self.layers.get(layer, {layer})
        if len(modules) > 1 or len(layers) > 1 or (modules, layers) == ({module}, {layer}):
            return None
        return f"blk.{next(iter(layers))}.{next(iter(modules))}.{sort}"


def place_near(box: apr.Container, piece: Piece, tensor: Tensor, first: int, reach: int = 4096) -> int | None:
    """Where a tensor's bytes are in the file, if not where the index says: `first` bytes away, or within `reach`."""
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
    """Decoded rows of a piece under every type its size allows, against rows of the reference's tensors.

    Args:
        piece: as written.
        tensors: the reference's, by name.
        expected: name -> their rows, filled on the way: several pieces are compared with one tensor.
    """

    def __init__(self, piece: Piece, tensors: dict[str, Tensor], expected: dict[str, SampledValues | None]) -> None:
        self.piece, self.tensors, self.expected = piece, tensors, expected
        self.size = int(np.prod(piece.shape))
        self.scores: dict[str, float] = {}
        self.samples: dict[tuple[TensorType, tuple[int, ...]], list[SampledValues]] = {}

    def score(self, name: str) -> float:
        """Largest correlation with the tensor `name`, over all types that fit."""
        if name not in self.scores:
            tensor = self.tensors[name]
            expected = self._expected(tensor) if self.size == tensor.size else None
            best = 0.0
            if expected is not None:
                best = max((best, *(correlation(values, expected) for values in self._found(tensor))))
            self.scores[name] = best
        return self.scores[name]

    def _expected(self, tensor: Tensor) -> SampledValues | None:
        if tensor.name not in self.expected:
            values = reference_sample(tensor)
            self.expected[tensor.name] = None if values is None else SampledValues(values)
        return self.expected[tensor.name]

    def _found(self, tensor: Tensor) -> list[SampledValues]:
        """The piece's rows under each type that its bytes could be, for a tensor of this type and shape."""
        key = (tensor.type, tensor.shape)
        if key not in self.samples:
            samples = (sample(self.piece.raw, kind, tensor.shape) for kind in kinds_for(self.piece, tensor))
            self.samples[key] = [SampledValues(values) for values in samples if values is not None]
        return self.samples[key]


__all__ = ["FileMatcher", "match_up", "place_near"]
