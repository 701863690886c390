"""What is fuzzed: each target takes bytes and does with them what a user of a file would. An `AprlabError` of one line is
a right answer to any bytes; every other exception is a finding.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aprlab.errors import AprlabError
from aprlab.formats import apr, gguf, raw, safetensors
from aprlab.formats import yaml_files as yamlfile
from aprlab.kernels.ptx.machine import KernelFault, Machine
from aprlab.kernels.ptx.parser import parse
from aprlab.model.model import Model
from aprlab.qualification import playbook
from aprlab.tracing.traces import Trace

_FOLDER = tempfile.TemporaryDirectory(prefix="aprlab-fuzz-")
STEPS = 20_000  # a PTX loop without end is stopped there


def _file(name: str, data: bytes) -> Path:
    path = Path(_FOLDER.name) / name
    path.write_bytes(data)
    return path


def _look(model: Model) -> None:
    for part in ("config", "tokenizer"):
        try:
            getattr(model, part)
        except AprlabError as error:
            _one_line(error)
    for tensor in model.tensors.values():
        tensor.check_values()
        tensor.dequantise(slice(0, 1) if len(tensor.shape) > 1 else None)
    model.close()


def _one_line(error: AprlabError) -> None:
    assert str(error) and "\n" not in str(error), f"not one line: {error!r}"


def read_gguf(data: bytes) -> None:
    """A GGUF file."""
    _look(gguf.open_model(_file("m.gguf", data)))


def read_apr(data: bytes) -> None:
    """An APR file; its two checksums are made right, so that what they protect is reached."""
    sealed = bytearray(data)
    if len(sealed) > 68 and sealed[:3] == b"APR":
        sealed[40:44] = apr.header_crc(bytes(sealed[:64])).to_bytes(4, "little")
    _look(apr.open_model(_file("m.apr", bytes(sealed)), verify=False))


def read_safetensors(data: bytes) -> None:
    """The header of a SafeTensors file."""
    for entry in safetensors.read_header(_file("m.safetensors", data)).entries:
        assert np.prod(entry.shape, dtype=object) >= 0


def look_gguf(data: bytes) -> None:
    """A GGUF file for the second reader, which looks past what the strict one refuses."""
    _look_past(_file("l.gguf", data))


def look_apr(data: bytes) -> None:
    """The same of an APR file, its header's checksum made right."""
    sealed = bytearray(data)
    if len(sealed) > 68 and sealed[:3] == b"APR":
        sealed[40:44] = apr.header_crc(bytes(sealed[:64])).to_bytes(4, "little")
    _look_past(_file("l.apr", bytes(sealed)))


def _look_past(path: Path) -> None:
    found = raw.look(path)
    for problem in found.problems:
        _one_line(problem)
    for piece in found.pieces:
        piece.fitting()
    assert isinstance(found.config, dict) and isinstance(found.tokenizer, dict)


zipfile.ZipExtFile._update_crc = lambda self, data: None  # so that what checksums protect is reached


def read_npz(data: bytes) -> None:
    """A stored trace."""
    loaded = Trace.load(_file("t.npz", data))
    loaded.summary()


def read_yaml(data: bytes) -> None:
    """A YAML file that people write, and as a playbook."""
    path = _file("p.yaml", data)
    yamlfile.load(path)
    playbook.load(path)


def run_ptx(data: bytes) -> None:
    """PTX text, and each of its kernels on one warp with null pointers for arguments."""
    module = parse(data.decode("utf-8", "replace"))
    for name, function in module.entries.items():
        try:
            Machine(module).launch(name, 1, 32, [0] * len(function.params), max_steps=STEPS)
        except KernelFault as error:
            assert str(error)


CORPUS_OF = {"raw-gguf": "gguf", "raw-apr": "apr"}  # the second reader reads the first one's files
TARGETS: dict[str, Callable[[bytes], None]] = {
    "gguf": read_gguf, "apr": read_apr, "safetensors": read_safetensors, "yaml": read_yaml, "ptx": run_ptx,
    "npz": read_npz, "raw-gguf": look_gguf, "raw-apr": look_apr,
}  # fmt: skip


def run(name: str, data: bytes) -> str:
    """``ok``, or the kind of refusal; anything else propagates."""
    try:
        TARGETS[name](data)
    except AprlabError as error:
        _one_line(error)
        return type(error).__name__
    return "ok"
