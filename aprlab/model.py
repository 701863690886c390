"""A model as aprlab sees it: config, tokenizer data and tensors, whichever container they came from.

Raw blocks are views on the mapped file; nothing is dequantised until somebody asks. Names are GGUF's, shapes are
NumPy's (rows first). ggml's order is called `ne` and only ever the reverse of `shape`; data never moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.formats.common import drop_pages
from aprlab.types import TensorType

if TYPE_CHECKING:
    from types import TracebackType


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor stood: the file, its name there, the absolute byte offset of its data (-1 in a compressed body)."""

    path: Path
    name: str
    offset: int

    def place(self, at: int = 0) -> int | None:
        """Absolute offset of byte `at` of its data; None in a compressed body, where there is none."""
        return self.offset + at if self.offset >= 0 else None


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor, still in the bytes of its file.

    Attributes:
        name: GGUF name, e.g. ``blk.0.attn_q.weight``.
        type: its row of the type table.
        shape: NumPy order, rows first: a weight is ``(outputs, inputs)``.
        raw: ``uint8``, 1-D, exactly ``type.nbytes(shape)`` bytes; read-only view on the mapped file.
        origin: where it came from.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    raw: np.ndarray
    origin: Origin

    @property
    def ne(self) -> tuple[int, ...]:
        """ggml's dimension order, fastest axis first: the reverse of `shape`."""
        return self.shape[::-1]

    @property
    def cols(self) -> int:
        """Length of a row (ggml's ``ne[0]``)."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows; 1 for a vector."""
        return self.size // self.cols

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the raw blocks."""
        return int(self.raw.nbytes)

    def blocks(self) -> np.ndarray:
        """Raw bytes by row: ``uint8 (rows, row_bytes)``, a view. AprQ8's leading scale is not part of a row."""
        return self.raw[self.type.tensor_bytes :].reshape(self.rows, self.type.row_bytes(self.cols))

    def dequantise(self, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """Values as ``float32``: of `shape`, or ``(len(rows), cols)`` for a slice or an index array of rows."""
        from aprlab import quants  # the decoders stand above the model, and only this method needs them

        if rows is None:
            return quants.dequantise(self.raw, self.type, self.shape)
        part = self.blocks()[rows]
        raw = np.concatenate([self.raw[: self.type.tensor_bytes], part.reshape(-1)]) if self.type.tensor_bytes else part
        return quants.dequantise(raw.reshape(-1), self.type, (part.shape[0], self.cols))

    def check_values(self, part: np.ndarray | None = None, start: int = 0) -> None:
        """Raise FormatError, with the byte offset of the block, where a scale (or a plain float) is NaN or infinite.

        `part` checks only these bytes, whole blocks that begin `start` bytes into the blocks; without it, all.
        """
        from aprlab.quants import quant
        from aprlab.quants.check import first_bad_block, scale_is_finite

        if part is None:
            step = (1 << 24) // self.type.block_bytes * self.type.block_bytes
            blocks = self.raw[self.type.tensor_bytes :]
            for at in range(0, max(len(blocks), 1), step):
                self.check_values(blocks[at : at + step], at)
                drop_pages(blocks[at : at + step])
            return
        blocks = part
        bad = first_bad_block(blocks, quant(self.type)) if scale_is_finite(self.raw, self.type) else 0
        if bad is not None:
            at = start + bad * self.type.block_bytes
            raise FormatError(
                f"{self.type.name} block {at // self.type.block_bytes} has a scale that is not a finite number",
                path=self.origin.path, tensor=self.name, offset=self.origin.place(self.type.tensor_bytes + at),
            )  # fmt: skip

    def replace(self, **changes: Any) -> Tensor:
        """A copy with some attributes changed."""
        fields = {"name": self.name, "type": self.type, "shape": self.shape, "raw": self.raw, "origin": self.origin}
        return Tensor(**{**fields, **changes})

    def _repr_html_(self) -> str:
        from aprlab.richview import tensor_page  # only a notebook asks

        return tensor_page(self)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.type.name}, shape={self.shape}, {self.nbytes} bytes)"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the forward pass has to know. Every value was read from the file; none is assumed.

    `rope_type` is ``neox`` (split halves, what Qwen2 uses) or ``norm`` (adjacent pairs). `rms_norm_eps` has no unit,
    `rope_theta` is the base of the rotary frequencies.
    """

    architecture: str
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rope_type: str
    rms_norm_eps: float
    tied_embeddings: bool


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """The tokenizer as a file carries it: GPT-2 style byte-level BPE for Qwen2.

    `tokens` and `merges` are in GPT-2's printable byte alphabet; `token_types` are ggml's (1 normal, 3 control, 4 user
    defined, 5 unused, 6 byte). Ids that a file does not carry are None.
    """

    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    add_bos: bool | None
    chat_template: str | None


@dataclass(eq=False)
class Model:
    """An opened model file. `Model.open(path)` finds the format by magic and checks everything but the values.

    `config` and `tokenizer` are made when first asked for, so that a file that lacks one of them can still be looked at.
    """

    path: Path  # of the file, or of a Hugging Face directory
    format: str  # "gguf", "apr" or "safetensors"
    dialect: str  # "gguf v3", "aprender", "aprender (no footer)", "realizar", "hugging face", "hugging face in 3 shards"
    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any]
    make_config: Callable[[], ModelConfig] = field(repr=False)
    make_tokenizer: Callable[[], TokenizerData] = field(repr=False)
    warnings: list[str] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Model:
        """Open a GGUF, APR or SafeTensors file, told apart by magic, or a Hugging Face directory with SafeTensors.

        Raises:
            UsageError: there is no such file, it cannot be read, or it is a directory without a model.
            FormatError: the file breaks a rule of its format (counts, spans, alignment, overlap, size law).
            UnsupportedError: a kind of file that is known by name and not handled (APR1, APRN, split, encrypted…).
        """
        path = Path(path)
        try:
            with open(path, "rb") as file:
                magic = file.read(9)
        except IsADirectoryError:
            from aprlab.formats import huggingface

            return huggingface.open_model(path)
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", path=path) from None
        # The formats build models, so they are imported when a file of theirs is met.
        if magic[:4] == b"GGUF":
            from aprlab.formats import gguf

            return gguf.open_model(path)
        if magic[:3] == b"APR":
            from aprlab.formats import apr

            return apr.open_model(path)
        if magic[8:] == b"{" or path.suffix == ".safetensors":  # no magic: a length of eight bytes, then JSON
            from aprlab.formats import huggingface

            return huggingface.open_model(path)
        found = magic[:4].hex(" ") or "nothing"
        raise FormatError(
            f"neither GGUF nor APR nor SafeTensors: the file starts with {found}, expected '47 47 55 46' or '41 50 52 00'",
            path=path,
            offset=0,
        )

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config; raises FormatError naming the key where one is missing."""
        return self.make_config()

    @cached_property
    def tokenizer(self) -> TokenizerData:
        """The model's tokenizer data; raises FormatError naming the key where one is missing."""
        return self.make_tokenizer()

    def tensor(self, name: str) -> Tensor:
        """The tensor with this GGUF name; raises FormatError where the file has none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise FormatError(f"has no tensor {name!r}", path=self.path) from None

    def check_values(self) -> None:
        """Raise FormatError for the first tensor with a scale that is NaN or infinite. Reads every block's scale."""
        for tensor in self.tensors.values():
            tensor.check_values()

    def by_type(self) -> dict[str, int]:
        """Number of tensors by type name, largest first."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.type.name] = counts.get(tensor.type.name, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def quantised(self) -> int:
        """Number of quantised tensors."""
        return sum(t.type.quantised for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def load_line(self) -> str:
        """The line the ticket made famous, told truly: by counting tensors, not uploads."""
        layers = self.config.block_count
        floats = [name for name in ("F32", "F16", "BF16", "F64") if name in self.by_type()]
        rest = ", ".join(f"{self.by_type()[name]} {name}" for name in floats) or "0 float"
        return f"{layers} layers, {self.quantised} quantised, {rest} tensors, {self.nbytes / 2**20:.0f} MB"

    def close(self) -> None:
        """Forget the tensors; the mapping goes when the last view on it does."""
        self.tensors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _repr_html_(self) -> str:
        from aprlab.richview import model_page

        return model_page(self)

    def __repr__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.by_type().items())
        return f"Model({str(self.path)!r}, {self.format} ({self.dialect}), {len(self.tensors)} tensors: {types})"


def require_qwen2(architecture: str, path: Path) -> None:
    """Only Qwen2 is understood; anything else is refused by name."""
    if architecture != "qwen2":
        raise UnsupportedError(f"architecture {architecture!r}; only 'qwen2' is handled", path=path)
