"""What values look like under a type: figures, and whether trained weights look like that.

Looks decide only between a reading that no model can have and one that any model could. They never speak against a
lawful float label: a norm in F16 is as good a number read as BF16, and only the label tells which it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aprlab.onion.samples import sample
from aprlab.quants.types import BF16, F16, F32, TensorType

FLOATS = (F32, F16, BF16)
_ABSURD_SIZE = (1e-7, 1e3)  # root mean squares that no trained tensor has; blocks read as another type are far outside
_TRAINED_SIZE = (1e-5, 1e2)
_ABSURD_SPREAD, _TRAINED_SPREAD = 1.0, 0.5  # decades; trained tensors are below 0.15, blocks of another type above 1.3


@dataclass(frozen=True)
class Looks:
    """Figures of sampled values.

    Attributes:
        finite: share of the values that are numbers.
        rms: their root mean square.
        spread: standard deviation of the size of groups of 32 values, in decades; groups of zeros do not count.
    """

    finite: float
    rms: float
    spread: float

    @property
    def absurd(self) -> bool:
        """No trained tensor looks like that: not finite, of an impossible size, or of sizes many decades apart."""
        low, high = _ABSURD_SIZE
        return self.finite < 1 or not low <= self.rms <= high or self.spread > _ABSURD_SPREAD

    @property
    def trained(self) -> bool:
        """A trained tensor may well look like that."""
        low, high = _TRAINED_SIZE
        return self.finite == 1 and low <= self.rms <= high and self.spread < _TRAINED_SPREAD

    def to_json(self) -> dict[str, Any]:
        """The figures, rounded."""
        return {name: float(f"{value:.3g}") for name, value in asdict(self).items()}


def looks_of(raw: np.ndarray, shape: tuple[int, ...], kind: TensorType) -> Looks | None:
    """Figures of sampled rows read as `kind`; None where they cannot be read, or all are zero."""
    values = sample(raw, kind, shape)
    if values is None or not values.size:
        return None
    finite = np.isfinite(values)
    wide = np.where(finite, values, 0).astype(np.float64)
    width = min(32, wide.shape[-1])
    groups = wide[:, : wide.shape[-1] // width * width].reshape(-1, width)
    sizes = np.sqrt((groups**2).mean(axis=1))
    sizes = sizes[sizes > 0]
    if not len(sizes) and finite.all():
        return None
    spread = float(np.log10(sizes).std()) if len(sizes) else 0.0
    return Looks(float(finite.mean()), float(np.sqrt((wide**2).mean())), spread)


def by_looks(
    raw: np.ndarray, shape: tuple[int, ...], options: list[TensorType], label: TensorType | None = None
) -> tuple[TensorType | None, dict[str, Looks]]:
    """The one type under which values look trained while they are absurd under the label, or under all other types.

    Args:
        raw: the bytes, uint8.
        shape: NumPy order.
        options: types that the size law allows.
        label: the lawful type that the index states, None where it states none.

    Returns:
        The type, None where looks do not decide; and the figures of every type that could be read.
    """
    if len(options) < 2 or label in FLOATS:
        return None, {}
    found = {kind: looks for kind in options if (looks := looks_of(raw, shape, kind)) is not None}
    figures = {kind.name: looks for kind, looks in found.items()}
    if label is not None and (label not in found or not found[label].absurd):
        return None, figures
    likely = [kind for kind, looks in found.items() if looks.trained]
    rest = [looks for kind, looks in found.items() if kind not in likely]
    decided = len(likely) == 1 and len(rest) > 0 and all(looks.absurd for looks in rest)
    return (likely[0] if decided else None), figures


__all__ = ["FLOATS", "Looks", "by_looks", "looks_of"]
