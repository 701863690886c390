"""The rest of ggml's types, decoded by the `gguf` package: IQ*, TQ*, MXFP4 and whatever it learns next."""

from __future__ import annotations

import numpy as np

from aprlab.errors import UnsupportedError
from aprlab.quants.base import Fields, Floats, Quant
from aprlab.quants.types import TensorType


def foreign(type_: TensorType) -> Quant:
    """A decoder for a ggml type without one of its own here; using it raises where `gguf` has none either."""
    return type(type_.name, (_Foreign,), {"type": type_, "layout": np.dtype([("raw", "u1", type_.block_bytes)])})()


class _Foreign(Quant):
    def decode_fields(self, b: Fields, out: Floats) -> None:
        from gguf import GGMLQuantizationType  # the whole package: slow to import, and seldom needed
        from gguf import quants as gguf_quants

        try:
            out[:] = gguf_quants.dequantize(b["raw"].reshape(1, -1), GGMLQuantizationType(self.type.code)).reshape(out.shape)
        except NotImplementedError:
            raise UnsupportedError(f"no decoder for tensor type {self.type}", code="quants.no-decoder") from None
