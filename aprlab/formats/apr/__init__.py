"""APR v2, in the dialects found in the wild: a strict reader, a scan for broken files, and a writer.

Layout: 64-byte header, JSON metadata, tensor index, data, each part on a multiple of 64; `docs/formats.md` has the
tables. `scan` reads whatever can be parsed and lists what is wrong; `open_model` raises the first thing that is wrong.
"""

from aprlab.formats.apr.labels import candidates, naming_of, type_of
from aprlab.formats.apr.layout import (
    ALIGNMENT,
    CONFIG_KEYS,
    DIALECTS,
    FLAGS,
    HEADER,
    HEADER_SIZE,
    ROPE_TYPES,
    Container,
    Dialect,
    Entry,
    header_crc,
)
from aprlab.formats.apr.metadata import SHARED_LISTS, config, file_only_metadata, metadata_of, text_of, tokenizer
from aprlab.formats.apr.reader import model_of, open_model
from aprlab.formats.apr.scanner import scan
from aprlab.formats.apr.writer import Late, Plan, crc32_of_both, write

__all__ = [
    "ALIGNMENT", "CONFIG_KEYS", "DIALECTS", "FLAGS", "HEADER", "HEADER_SIZE", "ROPE_TYPES", "SHARED_LISTS", "Container",
    "Dialect", "Entry", "Late", "Plan", "candidates", "config", "crc32_of_both", "file_only_metadata",
    "header_crc", "metadata_of", "model_of", "naming_of", "open_model", "scan", "text_of", "tokenizer", "type_of", "write",
]  # fmt: skip
