"""Arrays that a program left on disk, by name, each read when it is asked for; nothing in them is ever run.

``.npz``, ``.safetensors``, ``.pt`` (torch's safe loader alone), or a folder of ``.npy``, ``.pt`` and upstream's APRT files (``apr
trace --save-tensor``: magic, layer, count, then float32, little-endian; the stage is the file's name).
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import FormatError, UsageError
from aprlab.formats import safetensors
from aprlab.formats.reading import open_regular
from aprlab.quants import REGISTRY
from aprlab.tracing._stored import weighed

Reader = Callable[[], Any]  # gives one array
APRT = b"APRT"
_HEAD, _WHOLE = 12, 0xFFFFFFFF  # bytes of the header; the layer of what is outside the layers
_MOST_FILES = 100_000
# What NumPy and zipfile say of a file that holds none, or claims more than there is.
_NO_ARRAYS = (
    ValueError, EOFError, AttributeError, NotImplementedError, MemoryError, ArithmeticError, tokenize.TokenError,
    SyntaxError, TypeError, LookupError, RuntimeError, zipfile.BadZipFile,
)  # fmt: skip


def arrays_of(path: Path) -> dict[str, Reader]:
    """Arrays by name; pickled objects are refused.

    Raises:
        UsageError: it cannot be read, or torch is needed and is not there.
        FormatError: it holds no plain arrays.
    """
    if path.is_dir():
        return _folder(path)
    if path.suffix in (".pt", ".pth"):
        return {name: partial(_as_numpy, tensor) for name, tensor in _named(read(path, partial(_torch, path)), path.stem)}
    if path.suffix == ".bin":
        return {path.stem: partial(read, path, partial(_aprt, path, path.stem))}
    if path.suffix == ".safetensors":
        entries = safetensors.read_header(path).entries
        file = np.memmap(path, np.uint8, mode="r")
        return {e.name: partial(_floats, file, e) for e in entries}
    read(path, partial(weighed, path))
    stored = read(path, partial(np.load, path, allow_pickle=False))
    if not isinstance(stored, np.lib.npyio.NpzFile):
        said = "holds one array without a name; expected .npz, .safetensors, .pt or a folder"
        raise FormatError(said, code="dump.not-arrays", path=path)
    return {name: partial(read, path, partial(stored.__getitem__, name)) for name in stored.files}


def read(path: Path, load: Callable[[], Any]) -> Any:
    """What `load` gives of a regular file; what goes wrong is one line."""
    try:
        open_regular(path).close()
        return load()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", code="dump.unreadable", path=path) from None
    except _NO_ARRAYS as error:
        said = f"holds no plain arrays: {' '.join(str(error).split())}"
        raise FormatError(said, code="dump.not-arrays", path=path) from None


def _folder(path: Path) -> dict[str, Reader]:
    """Files by their path inside the folder, without its ending."""
    found: dict[str, Reader] = {}
    for count, file in enumerate(sorted(path.rglob("*"))):
        if count > _MOST_FILES:
            raise FormatError(f"a folder of more than {_MOST_FILES:,} files", code="dump.not-arrays", path=path)
        name = file.relative_to(path).with_suffix("").as_posix()
        if file.suffix == ".npy":
            # mapped: an array that claims more than its file has is refused before there is room for it
            found[name] = partial(read, file, partial(np.load, file, mmap_mode="r", allow_pickle=False))
        elif file.suffix == ".bin":
            found[name] = partial(read, file, partial(_aprt, file, name))
        elif file.suffix in (".pt", ".pth"):
            found[name] = partial(read, file, partial(_only, file))
    return found


def _floats(file: np.ndarray, entry: safetensors.SafetensorsEntry) -> np.ndarray:
    raw = np.array(file[entry.start : entry.stop])
    return np.asarray(REGISTRY[entry.type].dequantise(raw, entry.shape))


# ── APRT ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _aprt(path: Path, name: str) -> np.ndarray:
    """Values of one file, float32, 1-D: how many positions they are is not said in it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head[:4] != APRT or len(head) < _HEAD:
        raise ValueError(f"it begins with {head[:4]!r}, not with {APRT!r}")
    layer, count = struct.unpack("<II", head[4:])
    if size != _HEAD + 4 * count or not count:
        raise ValueError(f"its header says {count:,} values, {(size - _HEAD) / 4:,g} are there")
    folder = name.rpartition("/")[0].rpartition("/")[2]
    said = "outside the layers" if layer == _WHOLE else f"layer {layer}"
    if folder.startswith("layer-") and folder != f"layer-{layer}":
        raise ValueError(f"its header says {said}, and it lies in {folder}")
    return np.memmap(path, "<f4", mode="r", offset=_HEAD, shape=(count,))


# ── torch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        said = f"a .pt file needs torch: pip install 'aprlab[torch]': {error}"
        raise UsageError(said, code="source.torch-missing", path=path) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's own kinds: an object that is no tensor, a broken archive
        raise ValueError(f"torch's safe loader refuses it: {type(error).__name__}: {str(error).splitlines()[0][:200]}") from None


def _named(stored: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Tensors of what was stored, by their names; a dumper's ``{"value": tensor, …}`` is one tensor."""
    if isinstance(stored, dict):
        if hasattr(stored.get("value"), "detach"):
            yield name, stored["value"]
            return
        for key, value in stored.items():
            for inner, tensor in _named(value, str(key)):
                yield (inner if inner == str(key) else f"{key}.{inner}"), tensor
    elif hasattr(stored, "detach"):
        yield name, stored


def _only(path: Path) -> np.ndarray:
    tensors = list(_named(_torch(path), path.stem))
    if len(tensors) != 1:
        raise ValueError(f"it holds {len(tensors)} tensors; a file of a folder is one array")
    return _as_numpy(tensors[0][1])


def _as_numpy(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().float().numpy())


__all__ = ["APRT", "Reader", "arrays_of"]
