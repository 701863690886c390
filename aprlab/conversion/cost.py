"""What a change of type did to values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(slots=True)
class Cost:
    """What a change of type did to values, over all tensors that went from one type to the other.

    Attributes:
        type_in, type_out: names of the types.
        tensors: how many.
        square: sum of the squared values before, float64.
        error: sum of the squared differences.
        worst: largest difference.
    """

    type_in: str
    type_out: str
    tensors: int = 0
    square: float = 0.0
    error: float = 0.0
    worst: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the differences in units of the values' own; 0 means that no value changed."""
        return float(np.sqrt(self.error / self.square)) if self.square else float(np.sqrt(self.error))

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Count in some values, float32, before and after."""
        apart = (after - before).reshape(-1).astype(np.float64)
        values = before.reshape(-1).astype(np.float64)
        self.square += float(values @ values)
        self.error += float(apart @ apart)
        self.worst = max(self.worst, float(np.abs(apart).max(initial=0.0)))

    def __str__(self) -> str:
        what = f"re-encoded {self.tensors} tensors from {self.type_in} to {self.type_out}"
        cost = f"relative error {self.relative:.2g}, largest {self.worst:.2g}" if self.error else "no value changed"
        return f"{what}: {cost}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"type_in": self.type_in, "type_out": self.type_out, "tensors": self.tensors,
                "relative": self.relative, "worst": self.worst}  # fmt: skip
