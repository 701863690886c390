"""Layout: dims, and data moved about. A transform counts only where it gives the bytes exactly."""

from __future__ import annotations

from typing import Any, ClassVar

from aprlab.onion.layers.base import Case, Deviation, Layer


class Layout(Layer):
    """Dims against the reference's, or against what the config demands."""

    name: ClassVar[str] = "layout"

    def suspect(self, case: Case) -> list[Deviation]:
        due = expected_shapes(case)
        found = []
        for match in case.matches:
            wanted = due.get(match.true or "")
            if wanted is None or match.piece.shape == wanted:
                continue
            how = "dims are not those of this tensor"
            if match.piece.shape == wanted[::-1]:
                how = "dims are in the reverse order"
            evidence: dict[str, Any] = {"elements_agree": _size(match.piece.shape) == _size(wanted)}
            found.append(Deviation("layout", "dims", match.true or "", match.piece.shape, wanted, how, match, evidence))
        return found


def _size(shape: tuple[int, ...]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n


def expected_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors: the reference's, else those that the file's own config demands."""
    if case.ref is not None:
        return {name: tensor.shape for name, tensor in case.ref.tensors.items()}
    from aprlab.model.inventory import shapes
    from aprlab.onion.layers.base import made_config

    try:
        have = {p.stated: p for p in case.seen.pieces}
        config = made_config(case.seen.config, {n: None for n in have if n}, case.seen.path)  # type: ignore[misc]
        return shapes(config)
    except Exception:
        return {}  # the config layer says what is wrong with it
