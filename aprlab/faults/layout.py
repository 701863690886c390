"""C. Span, shape and layout: the right bytes in the wrong place, or under the wrong shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from aprlab.conversion.mixes import SUBSTITUTES
from aprlab.conversion.recode import at_hand
from aprlab.conversion.seams import Seams
from aprlab.engines.base import Array, Engine
from aprlab.engines.delegating import DelegatingEngine
from aprlab.faults.base import Fault, lines
from aprlab.faults.naming import gguf_name
from aprlab.faults.tensors import Edited, change_tensors, config_of, edit_index, is_, with_values
from aprlab.formats import apr
from aprlab.formats.apr import Entry
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.quants.types import TensorType

# ── spans ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def shift_offsets(path: Path) -> None:
    """Every tensor begins one alignment unit too late: the padding of the index was counted twice."""
    edit_index(path, lambda entries: [replace(entry, offset=entry.offset + apr.ALIGNMENT) for entry in entries])


def truncate(path: Path) -> None:
    """The last 4.5 % of the file are not there."""
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size * 955 // 1000)


def overlap(path: Path) -> None:
    """ffn_gate of layer 0 begins where ffn_up of layer 0 does."""

    def moved(entries: list[Entry]) -> list[Entry]:
        at = {gguf_name(entry.name): entry for entry in entries}
        gate, up = at["blk.0.ffn_gate.weight"], at["blk.0.ffn_up.weight"]
        return [replace(entry, offset=up.offset) if entry is gate else entry for entry in entries]

    edit_index(path, moved)


# ── shapes and data ───────────────────────────────────────────────────────────────────────────────────────────────


def swap_dims(s: Seams) -> Seams:
    """Dimensions reversed once too often; the data is right."""
    return replace(s, dims=lambda shape: s.dims(shape)[::-1])


def turned(values: np.ndarray) -> np.ndarray:
    """(rows, cols) -> (cols, rows) in C order; some rows at a time, since each value would be a cache line of its own."""
    out = np.empty(values.shape[::-1], values.dtype)
    for start in range(0, len(values), 256):
        out[:, start : start + 256] = values[start : start + 256].T
    return out


def transposed(values: np.ndarray) -> np.ndarray:
    """(rows, cols) -> the transpose's values in C order, to be taken for (rows, cols) again."""
    return turned(values).reshape(values.shape)


def turned_from(places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where each value of the transpose of a matrix comes from, both as places in C order."""
    rows, cols = shape
    return places % rows * cols + places // rows


def transpose_data(*only: str) -> Callable[[Seams], Seams]:
    """Every matrix (or only these) transposed in memory, under its old shape."""

    def change(tensor: Tensor) -> Tensor:
        wanted = len(tensor.shape) == 2 and (not only or is_(tensor.name, *only))
        return with_values(tensor, transposed, origin=turned_from) if wanted else tensor

    return lambda s: change_tensors(s, change)


def fitting(kind: TensorType, cols: int) -> TensorType:
    """`kind`, or what llama.cpp would put in its place for rows of this width; F16 where that does not fit either."""
    for candidate in (kind, SUBSTITUTES.get(kind, kind)):
        if cols % candidate.block_elements == 0:
            return candidate
    return types.F16


def reverse_both(s: Seams) -> Seams:
    """Shape and data both reversed: each tensor is its own transpose, consistently."""

    def change(tensor: Tensor) -> Tensor:
        if len(tensor.shape) != 2:
            return tensor
        kind = fitting(tensor.type, tensor.rows)
        return with_values(tensor, turned, shape=tensor.shape[::-1], kind=kind, origin=turned_from)

    return change_tensors(s, change)


def flat_tensor(tensor: Tensor) -> Tensor:
    """Q4_K super-blocks over the whole tensor, rows or no rows, under the shape that it has."""
    blocks = -(-tensor.size // 256)

    def compute(values: np.ndarray) -> np.ndarray:
        held = np.zeros(blocks * 256, np.float32)
        held[: values.size] = values.reshape(-1)
        return held

    content = Edited(tensor, types.Q4_K, (blocks, 256), compute, lambda places, shape: places)
    return tensor.replace(type=types.Q4_K, content=content)


def broken_rows(tensor: Tensor) -> bool:
    """A matrix whose rows hold no whole super-blocks of 256."""
    return len(tensor.shape) == 2 and tensor.cols % 256 != 0


def flat_blocks(s: Seams) -> Seams:
    """Rows whose width is not a multiple of 256 as Q4_K anyway: super-blocks cross row boundaries."""

    def change(tensor: Tensor) -> Tensor:
        if not broken_rows(tensor):
            return tensor
        return flat_tensor(tensor)

    return change_tensors(s, change)


class PaddedActivations(DelegatingEngine):
    """Activations and rows padded to a multiple of 256, weights not padded: row r is read at r × padded."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self.kept: dict[str, np.ndarray] = {}

    def _seen(self, tensor: Tensor) -> np.ndarray:
        """What such a kernel takes for the weight: (rows, cols rounded up to 256); zeros beyond the end."""
        if tensor.name not in self.kept:
            padded = -(-tensor.cols // 256) * 256
            held = np.zeros(tensor.rows * padded, np.float32)
            held[: tensor.size] = tensor.dequantise().reshape(-1)
            self.kept[tensor.name] = held.reshape(tensor.rows, padded)
        return self.kept[tensor.name]

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        tensor = self.matrix(weight, x.shape[-1])
        if not broken_rows(tensor):
            return self.inner.matmul(x, weight, bias)
        y = self.to_numpy(x) @ self._seen(tensor)[:, : tensor.cols].T  # the padding of x is zeros
        if bias is not None:
            y = y + self.vector(bias, tensor.rows).dequantise()
        return self.from_numpy(y)


def permuted_rows(heads: int, rows: int) -> np.ndarray:
    """Row order of Llama's conversion: of each head, rows 0, D/2, 1, D/2 + 1, … as indices ``(rows,)``."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def permute_qk(s: Seams) -> Seams:
    """Rows of Q and K, biases too, in the order that Llama's conversion gives them for NORM rotation."""

    def change(tensor: Tensor) -> Tensor:
        for stem in ("attn_q", "attn_k"):
            if is_(tensor.name, f"{stem}.weight", f"{stem}.bias"):
                tensor = at_hand(tensor)
                rows = tensor.shape[0]
                order = permuted_rows(rows // config_of(tensor).head_dim, rows)
                raw = tensor.raw.reshape(rows, -1)[order]
                return tensor.replace(raw=np.ascontiguousarray(raw).reshape(-1))
        return tensor

    return change_tensors(s, change)


_STILL = "Counts, shapes, sizes and any order-independent checksum are unchanged"

FAULTS = (
    Fault(
        "offset-shifted", "Every tensor offset 64 bytes too high", "container", "C",
        lines(
            "The padding after the index was counted twice.",
            "Each tensor is read from 64 bytes into its data to 64 bytes into the next one.",
            "Blocks are misaligned: quants are read as scales.",
        ),
        "Every offset is one alignment unit too high; the last tensor ends past the end of the data.",
        post=shift_offsets,
    ),
    Fault(
        "truncated", "File truncated: the last 4.5 % missing", "container", "C",
        lines(
            "An interrupted download or a full disk truncated the file.",
            "Header, metadata and index are intact, so most tools list it as a good file.",
            "Upstream called a file truncated to 95.5 % valid.",
        ),
        "Spans end past the end of the file; the footer is missing.",
        post=truncate,
    ),
    Fault(
        "overlapping-tensors", "Two tensors at the same offset", "container", "C",
        lines(
            "An offset was computed from the wrong predecessor.",
            "gate and up of layer 0 read the same bytes.",
            "Shape, type and size of both are correct.",
        ),
        "Two spans overlap; an aligned range of bytes belongs to no tensor.",
        post=overlap,
    ),
    Fault(
        "dims-swapped", "Dimensions reversed, data correct", "layout", "C",
        lines(
            "GGUF's dims were copied, or reversed twice, where row-major order is expected.",
            "Square matrices do not show it; k and v do: 256 × 1536 or 1536 × 256.",
            "Readers that take shapes from the config never notice.",
        ),
        "All matrix shapes are the reverse of what the config implies; bytes equal.",
        seams=swap_dims,
    ),
    Fault(
        "double-reversal", "Shape and data both reversed", "layout", "C",
        lines(
            "Only the dims needed reversing; the data was transposed as well.",
            "Every tensor is a well-formed transpose of the original.",
            "The half of GH-202 that had been fixed came back together with the other half.",
        ),
        "Shapes reversed; decoded values are those of the transpose, up to requantisation.",
        seams=reverse_both,
    ),
    Fault(
        "GH-202", "Data transposed needlessly", "layout", "C",
        lines(
            "ggml's i0 + i1·ne0 already is row-major [ne1, ne0]; only the shape has to be reversed.",
            "The data was decoded, transposed and re-encoded, under the correct shape.",
            "Mean, std, min, max and sums do not change; the output is multilingual word salad.",
        ),
        _STILL + " (up to requantisation); correlation with the correct values about 0.",
        seams=transpose_data(),
    ),
    Fault(
        "transposed-embedding", "Embedding transposed", "layout", "C",
        lines(
            "Only the embedding was transposed: it went through a code path of its own.",
            "Each token's vector is made of numbers from many other tokens' vectors.",
            "The rest of the file is bitwise equal.",
        ),
        _STILL + "; cosine similarity is about 0 from the first step on.",
        seams=transpose_data("token_embd.weight"),
    ),
    Fault(
        "GH-370", "Super-blocks that cross row boundaries", "layout", "C",
        lines(
            "K types were written flat over the whole tensor; each row needs its own whole blocks.",
            "If the row width is not a multiple of 256, a row-by-row reader soon drifts out of step.",
            "No larger model has such widths: only the 0.5B (896) fails.",
        ),
        "Q4_K on rows that do not hold whole blocks: n/256 × 144 bytes; the first row is correct, later rows drift.",
        seams=flat_blocks, needs="rows whose width is not a multiple of 256 (the 0.5B)",
    ),
    Fault(
        "padded-activations", "Activations padded to 256, weights not padded", "layout", "C",
        lines(
            "To support row widths that are not multiples of 256, activations were padded with zeros.",
            "The weights have no padding, so row r is read at r × 1024 instead of r × 896.",
            "The last rows are silently zero.",
        ),
        "Row 0 of such products is correct, later rows drift, the last ones are 0.",
        engine=PaddedActivations, needs="rows whose width is not a multiple of 256 (the 0.5B)",
        fits=lambda model: any(broken_rows(tensor) for tensor in model.tensors.values() if tensor.name != "token_embd.weight"),
    ),
    Fault(
        "permuted-qk", "Q and K rows permuted as for Llama", "layout", "C",
        lines(
            "The Llama conversion reorders the rows of Q and K, so that NORM rotation gives the result of NEOX.",
            "Qwen2 uses NEOX rotation and must not be permuted.",
            "With rope-norm on top the answer is correct again: two bugs that mask each other.",
        ),
        "Rows of Q and K (weights and biases) are reordered within each head; the norm of each head is unchanged.",
        seams=permute_qk,
    ),
)  # fmt: skip
