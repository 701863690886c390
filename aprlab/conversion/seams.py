"""Where a conversion decides something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aprlab.conversion.recode import re_encoded
from aprlab.formats import apr
from aprlab.model import names
from aprlab.model.tensor import Tensor
from aprlab.quants.types import TensorType


@dataclass(frozen=True)
class Seams:
    """Where a conversion decides something. Each is a function, so that a historic bug can stand in for one of them.

    Attributes:
        name: GGUF name -> name in the file.
        code: type -> dtype byte.
        dims: shape (NumPy order) -> dims as written.
        tensor: the tensor to be written, e.g. re-encoded; gets and gives GGUF names and NumPy shapes.
        metadata: the finished metadata object.
        plans: the finished list of tensors, in file order.
    """

    name: Callable[[str], str]
    code: Callable[[TensorType], int]
    dims: Callable[[tuple[int, ...]], tuple[int, ...]]
    tensor: Callable[[Tensor], Tensor]
    metadata: Callable[[dict[str, Any]], dict[str, Any]] = lambda metadata: metadata
    plans: Callable[[list[apr.Plan]], list[apr.Plan]] = lambda plans: plans


def healthy_seams(
    dialect: apr.Dialect, target: TensorType | None = None, retype: Callable[[Tensor], Tensor] | None = None
) -> Seams:
    """The seams of a correct conversion.

    Args:
        dialect: how the APR file is written.
        target: the type that every 2-D weight is re-encoded to; None keeps all types.
        retype: a tensor -> the tensor to write, instead of `target`.
    """
    return Seams(
        name=lambda name: names.from_gguf(name, dialect.naming),
        code=lambda kind: kind.code,
        dims=lambda shape: shape if dialect.dims == "rows" else shape[::-1],
        tensor=retype or (lambda tensor: tensor if target is None else re_encoded(tensor, target)),
    )
