"""Hostile sizes: refused fast, in little memory. Each file is opened in a process of its own, whose peak is looked at."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

MB = 2**20
OPEN = """
import json, sys, time
from aprlab.formats import open_model
from aprlab.model import Model  # noqa: E402
from aprlab.errors import AprlabError
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before, started = peak(), time.process_time()
try:
    model = open_model(sys.argv[1])
    model.config, model.tokenizer
    said = "opened"
except AprlabError as error:
    said = str(error)
print(json.dumps({"said": said, "grown": peak() - before, "seconds": time.process_time() - started}))
"""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors: int, fields: list[bytes], rest: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, len(fields)) + b"".join(fields) + rest


def strings(key: str, claimed: int, sent: bytes) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, 8, claimed) + sent


HOSTILE = {
    # 300 MB of names that a file could hold, if it held them
    "ten million tensors": lambda: gguf(10_000_000, [], bytes(1000)),
    "ten million tensors, there": lambda: gguf(10_000_000, [], (text("x") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 1_000_000),
    "metadata of 100 MB": lambda: gguf(0, [text("k") + struct.pack("<I", 8) + text("a" * 100 * MB)]),
    "ten million empty strings": lambda: gguf(0, [strings("tokenizer.ggml.tokens", 10_000_000, bytes(8) * 10_000_000)]),
    "array of 2^60 bytes": lambda: gguf(0, [text("k") + struct.pack("<IIQ", 9, 0, 2**60)]),
    "arrays in arrays": lambda: gguf(0, [text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000]),
    "metadata of 2 GB": lambda: b"APR\0" + struct.pack("<BBHIQIQQ", 2, 0, 0, 1, 64, 2**31 - 1, 64, 64) + bytes(100),
    "SafeTensors header of 90 MB": lambda: struct.pack("<Q", 90 * MB) + b"{" + b" " * 90 * MB,
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_sizes(name: str, tmp_path: Path) -> None:
    path = tmp_path / ("m.safetensors" if "SafeTensors" in name else "m")
    path.write_bytes(HOSTILE[name]())
    size = path.stat().st_size
    done = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(done.stdout)
    assert seen["said"] != "opened" and "\n" not in seen["said"] and str(path) in seen["said"]
    assert seen["grown"] < 3 * size + 64 * MB, seen  # the mapped pages count, and a text is there as bytes and as characters
    assert seen["seconds"] < 20, seen  # not a speed test: an endless loop is what this is about
