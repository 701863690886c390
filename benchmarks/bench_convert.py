"""Conversion against `cp` and one CRC-32 pass over the same warm file, interleaved in one run, flushed to disk alike.

    python benchmarks/bench_convert.py [MODEL.gguf] [--rounds 7]

Also prints the reader's seconds and memory, and the whole process's seconds. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

from aprlab import paths
from aprlab.conversion.converter import convert, export
from aprlab.formats import open_model


def copy_and_crc(source: Path, target: Path) -> None:
    """What any converter has to do at least: every byte read, summed, written and flushed."""
    subprocess.run(["cp", source, target], check=True)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())
    crc, buffer = 0, memoryview(bytearray(1 << 20))
    with open(source, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            crc = zlib.crc32(buffer[:got], crc)


def seconds(action) -> float:
    os.sync()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def show(name: str, values: list[float], unit: str = "s") -> None:
    print(f"{name:44} {statistics.median(values):7.3f} {unit}   ({min(values):.3f} … {max(values):.3f})")


def memory_of(code: str, model: Path) -> float:
    """Peak memory of a fresh interpreter that runs `code`, above one that only imports the same modules; MiB."""
    head = "import re, sys; import numpy, xxhash; from aprlab.conversion import convert; from aprlab.formats import apr, gguf\n"
    tail = "\nprint(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"  # ru_maxrss would be the parent's
    run = lambda body: int(subprocess.check_output([sys.executable, "-c", head + body + tail, model], text=True))  # noqa: E731
    return (run(code) - run("pass")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=paths.embedded_model())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        apr, copy, back = (Path(folder) / name for name in ("model.apr", "copy.gguf", "back.gguf"))
        shutil.copyfile(options.model, copy)  # warms the page cache
        times: dict[str, list[float]] = {name: [] for name in ("convert", "copy", "export", "open", "config", "process")}
        for _ in range(options.rounds):
            times["copy"].append(seconds(lambda: copy_and_crc(options.model, copy)))
            times["convert"].append(seconds(lambda: convert(options.model, apr, force=True)))
            times["export"].append(seconds(lambda: export(apr, back, force=True)))
            times["open"].append(seconds(lambda: open_model(options.model)))
            model = open_model(options.model)
            times["config"].append(seconds(lambda: (model.config, model.tokenizer)))  # noqa: B023
            command = [sys.executable, "-m", "aprlab", "convert", options.model, "-o", apr, "--force"]
            times["process"].append(seconds(lambda: subprocess.run(command, check=True, capture_output=True)))  # noqa: B023
        size = options.model.stat().st_size
        print(f"{options.model.name}, {size / 1e6:.0f} MB, {options.rounds} rounds: median (min … max)")
        show("cp, fsync, one CRC-32 pass", times["copy"])
        show("convert, fsync included", times["convert"])
        show("ratio", [a / b for a, b in zip(times["convert"], times["copy"], strict=True)], "×")
        show("export", times["export"])
        show("open the GGUF", times["open"])
        show("config and tokenizer data", times["config"])
        show("whole process: aprlab convert", times["process"])
        code = "m = gguf.open_model(sys.argv[1]); m.config; m.tokenizer"
        print(f"{'memory to open, with tokenizer data':44} {memory_of(code, options.model):7.1f} MiB above the interpreter")
        code = f"convert(sys.argv[1], {str(apr)!r}, force=True)"
        print(f"{'memory to convert':44} {memory_of(code, options.model):7.1f} MiB above the interpreter")
        print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
