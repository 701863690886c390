"""The parts of an APR file: header, flags, index rows, dialects, and the keys of its config."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import AprlabError
from aprlab.model.content import Content
from aprlab.model.remote import RemoteFile, content_at
from aprlab.quants import types
from aprlab.quants.types import TensorType

HEADER = struct.Struct("<4sBBHIQIQQI20x")
HEADER_SIZE = HEADER.size
assert HEADER_SIZE == 64
ALIGNMENT = 64
METADATA_LIMIT = 16 * 2**20
NAME_LIMIT, DIMS_LIMIT = 256, 8
ENTRY_LEAST = 2 + 1 + 1 + 1 + 8 + 8 + 8  # the shortest index entry: a name of one byte, one dimension
LZ4_LIMIT = 0x7E000000  # bytes of an LZ4 block before it is packed
# A compressed body may unpack to EXPANSION times its length and EXPANSION_FREE bytes: weights shrink to a half at best, zstd
# could claim 30,000 times.
EXPANSION, EXPANSION_FREE = 64, 64 << 20

FLAGS = {
    "lz4": 0x0001, "zstd": 0x0002, "encrypted": 0x0004, "signed": 0x0008, "sharded": 0x0010, "quantized": 0x0020,
    "filterbank": 0x0040, "model_card": 0x0080, "streaming": 0x0100, "has_vocabulary": 0x0200,
    "row_major": 0x0400, "column_major": 0x0800,
}  # fmt: skip

# Bytes that mean two things: ggml's type, and what aprender gave the number to. The size law decides.
AMBIGUOUS: dict[int, tuple[TensorType, ...]] = {
    3: (types.Q4_1, types.F64),
    5: (types.by_name("I64"),),
    6: (types.Q5_0, types.by_name("I8")),
    8: (types.Q8_0, types.APR_Q4),
    9: (types.Q8_1, types.APR_Q8),
}
# aprender's U8 has no ggml type; its number is Q5_1's.
APRENDER_U8 = 7


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the tensor index, exactly as written. `offset` is relative to the data, `at` is where the row stands."""

    name: str
    code: int
    dims: tuple[int, ...]
    offset: int
    size: int
    at: int = 0

    def pack(self) -> bytes:
        """The row's bytes."""
        name = self.name.encode()
        head = struct.pack("<H", len(name)) + name + struct.pack("<BB", self.code, len(self.dims))
        return head + struct.pack(f"<{len(self.dims)}QQQ", *self.dims, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one writer writes.

    `naming` is a key of `names.VARIANTS`; `dims` is ``rows`` (NumPy order) or ``ne`` (ggml order).
    """

    name: str
    naming: str
    dims: str
    flags: int
    sorted_index: bool
    footer: bool
    keys: dict[str, str]  # config field -> metadata key


_COMMON = {
    "architecture": "architecture",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rope_type": "rope_type",
    "rms_norm_eps": "rms_norm_eps",
    "head_dim": "head_dim",
}
DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "aprender", "canonical", "rows", FLAGS["row_major"], True, True,
            {**_COMMON, "block_count": "num_layers", "head_count": "num_heads", "head_count_kv": "num_kv_heads"},
        ),
        Dialect(
            "realizar", "raw", "ne", 0, False, False,
            {**_COMMON, "block_count": "num_hidden_layers", "head_count": "num_attention_heads",
             "head_count_kv": "num_key_value_heads"},
        ),
    )
}  # fmt: skip

# Every key a config value was ever written under, and the value upstream's reader assumes where none is there.
CONFIG_KEYS: dict[str, tuple[tuple[str, ...], str]] = {
    "architecture": (("architecture",), "unknown"),
    "block_count": (("num_layers", "n_layers", "num_hidden_layers", "n_layer"), "0"),
    "embedding_length": (("hidden_size", "hidden_dim", "d_model", "n_embd"), "0"),
    "feed_forward_length": (("intermediate_size", "ffn_dim", "intermediate_dim", "n_inner"), "4 × hidden_size"),
    "head_count": (("num_heads", "n_heads", "num_attention_heads", "n_head"), "0"),
    "head_count_kv": (("num_kv_heads", "n_kv_heads", "num_key_value_heads"), "num_heads"),
    "vocab_size": (("vocab_size", "n_vocab"), "0"),
    "context_length": (("max_position_embeddings", "max_seq_len", "context_length", "n_ctx"), "2048"),
    "rope_theta": (("rope_theta",), "10000.0"),
    "rope_type": (("rope_type",), "0 (NORM)"),
    "rms_norm_eps": (("rms_norm_eps", "layer_norm_eps", "norm_eps"), "1e-06"),
    "head_dim": (("head_dim",), "hidden_size / num_heads"),
}
WHOLE = (
    "block_count", "embedding_length", "feed_forward_length", "head_count", "head_count_kv", "vocab_size", "context_length",
)  # fmt: skip
ROPE_TYPES = {0: "norm", 2: "neox"}


@dataclass
class Container:
    """An APR file taken apart, nothing interpreted yet.

    `image` is the whole file as ``uint8``, decompressed where it was compressed. `problems` holds what a strict reader
    refuses but a scan can look past, in file order.
    """

    path: Path
    magic: bytes
    version: tuple[int, int]
    flags: int
    metadata_offset: int
    metadata_size: int
    index_offset: int
    data_offset: int
    metadata: dict[str, Any]
    entries: list[Entry]
    image: np.ndarray = field(repr=False)
    footer: int | None = None
    compression: str | None = None
    problems: list[AprlabError] = field(default_factory=list)
    remote: RemoteFile | None = None  # where the file is at a URL: `image` then holds its beginning alone

    @property
    def size(self) -> int:
        """Bytes of the whole image."""
        return len(self.image) if self.remote is None else self.remote.size

    def from_(self, start: int) -> np.ndarray:
        """The last bytes of the image, ``uint8``, fetched where it is remote."""
        return self.image[start:] if self.remote is None else self.remote.read(start, self.remote.size)

    def content(self, entry: Entry) -> Content | np.ndarray:
        """What a tensor is made of: `bytes_of`, or ranges of the remote file."""
        start = self.data_offset + entry.offset
        return content_at(self.image, self.remote, start, start + entry.size)

    @property
    def flag_names(self) -> list[str]:
        """The names of the flags that are set."""
        return [name for name, bit in FLAGS.items() if self.flags & bit]

    def bytes_of(self, entry: Entry) -> np.ndarray:
        """The bytes the index gives to `entry`: a ``uint8`` view, shorter where the file ends before them."""
        start = self.data_offset + entry.offset
        return self.image[start : start + entry.size]


def header_crc(header: bytes) -> int:
    """CRC-32 over the header without its own field: bytes 0..39, then 44..63."""
    return zlib.crc32(header[44:64], zlib.crc32(header[:40]))
