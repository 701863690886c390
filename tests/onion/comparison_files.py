"""GGUF files made from the embedded model by a change of one tensor's bytes, type or values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from variants import variant

from aprlab import paths, quants
from aprlab.formats import open_model
from aprlab.model.tensor import Origin, Tensor
from aprlab.quants.types import TensorType

REF = paths.embedded_model()


def as_type(tensor: Tensor, kind: TensorType, change: Callable[[np.ndarray], np.ndarray] | None = None) -> Tensor:
    """The tensor's values, changed by a function of float32 (rows, columns), held as `kind`."""
    values = tensor.dequantise().reshape(-1, tensor.shape[-1])
    values = values if change is None else np.ascontiguousarray(change(values.copy()), np.float32)
    raw = quants.quantise(values, kind).reshape(-1)
    return Tensor(tensor.name, kind, tensor.shape, raw, Origin(tensor.origin.path, tensor.name, -1))


def file_with(output: Path, changes: Mapping[str, Callable[[Tensor], Tensor]], source: Path = REF) -> Path:
    """`source` with some of its tensors changed, by name."""
    with open_model(source) as model:
        return variant(source, output, tensors={name: change(model.tensors[name]) for name, change in changes.items()})
