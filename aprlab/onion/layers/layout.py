"""Layout: dims. How data were moved about, the weights layer finds out; it counts only where it gives the bytes exactly."""

from __future__ import annotations

import math
from typing import ClassVar

from aprlab.errors import BROKEN
from aprlab.formats import apr
from aprlab.model.inventory import shapes
from aprlab.onion.draft import Draft, made_config
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.layers.config import by_shapes
from aprlab.onion.layers.layer import Layer
from aprlab.onion.words import Mechanism


class LayoutLayer(Layer):
    """Dims against the reference's, or against what the config demands."""

    name: ClassVar[str] = "layout"
    kinds: ClassVar[tuple[str, ...]] = ("dims",)
    shown: ClassVar[tuple[str, ...]] = ("dims",)

    def suspect(self, case: FileCase) -> list[Deviation]:
        known = expected_shapes(case)
        found = []
        for match in case.matches:
            shape, expected = match.piece.shape, known.get(match.true or "")
            if expected is None or shape == expected:
                continue
            cause = Mechanism("layout.dims-reversed" if shape == expected[::-1] else "layout.dims-differ")
            evidence = {"elements_agree": math.prod(shape) == math.prod(expected)}
            found.append(Deviation("dims", match.true or "", shape, expected, cause, match, evidence))
        return found

    def repair(self, draft: Draft, deviation: Deviation) -> None:
        slot = draft.slot(deviation)
        if slot is None:
            return
        assert deviation.match is not None
        slot.shape = deviation.expected
        fits = [t for t in apr.candidates(deviation.match.piece.code) if t.fits(slot.shape, len(slot.raw))]
        slot.kind = fits[0] if slot.kind is None and len(fits) == 1 else slot.kind


def expected_shapes(case: FileCase) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors: the reference's, else those that the file's own config demands."""
    if case.ref is not None:
        return {name: tensor.shape for name, tensor in case.ref.tensors.items()}
    if case.file.unrun is not None:
        return {}
    try:
        have = {p.stated: p for p in case.file.pieces}
        config = {**case.file.config, **by_shapes(case)}
        return shapes(made_config(config, {n: None for n in have if n}, case.file.path))  # type: ignore[misc]
    except (*BROKEN, ArithmeticError):
        return {}  # the config layer says what is wrong with it


__all__ = ["LayoutLayer", "expected_shapes"]
