"""The files of a Hugging Face folder beside its weights: their names, and how a text of a fair size is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aprlab.errors import FormatError, UsageError
from aprlab.formats.reading import json_object, read_bytes
from aprlab.model.remote import is_there, open_url, url_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip
INDEX_SUFFIX = ".safetensors.index.json"
_FILES = (".safetensors", INDEX_SUFFIX, ".gguf", ".apr")
TEMPLATE, PIECES = "chat_template.jinja", "tokenizer.model"
WRITTEN = (SINGLE, CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION)
READ = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, PIECES, INDEX)  # next to the weights
JSON_LIMIT = 64 * 2**20  # the largest text file that is read at all; Qwen2's tokenizer.json has 7 MB


def folder_of(path: Path) -> Path:
    """The folder that a model's files lie in: `path`, or that of a weight file."""
    url = url_of(path)
    folder = path.is_dir() if url is None else is_folder(url)
    return path if folder else path.parent


def is_folder(url: str) -> bool:
    """Whether a URL is that of a model's folder: nothing that can be read is there, but a config.json below it is."""
    if url.endswith(_FILES):
        return False
    try:
        remote = open_url(url)
        if remote.size and remote.read(0, 1).tobytes() != b"<":  # else perhaps a page that lists the folder
            return False
    except UsageError as error:
        if error.code not in ("remote.not-found", "remote.no-ranges", "remote.refused"):
            raise
    try:
        return is_there(f"{url.rstrip('/')}/{CONFIG}")
    except UsageError:
        return False


_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8"}


def quantised(raw: dict[str, Any]) -> tuple[str, str] | None:
    """What a folder is whose config.json says that another program quantised its weights, and what to do; else None."""
    found = raw.get("quantization_config")
    if found is None:
        return None
    method = str(found.get("quant_method", "an unnamed method")) if isinstance(found, dict) else "an unnamed method"
    return (
        f"is a checkpoint quantised by {_METHODS.get(method, method[:40])} (quantization_config in {CONFIG})",
        "give the checkpoint that it was made of, or have transformers undo it: model.dequantize(), then save_pretrained",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the folder; a missing one is an error that names it."""
    return json_object(read_text(path), "the file", path)


def read_text(path: Path) -> str:
    """A text file of the folder, of a size that one may have."""
    try:
        return read_bytes(path, JSON_LIMIT).decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"is not UTF-8 ({error.reason})", code="reading.not-utf8", path=path, offset=error.start
        ) from None
    except FileNotFoundError:
        said = "is missing; a SafeTensors model needs it next to its weights"
        raise UsageError(said, code="huggingface.missing-file", path=path) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", code="reading.unreadable", path=path) from None


def short(value: Any) -> str:
    """A value on a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
