"""Processor time of whole commands, start and all: `python benchmarks/bench_start.py MODEL.gguf [--against CHECKOUT] [--cold]`.

Processor seconds (user and system, of the process and its threads) say what a command costs on a machine that is busy with other
things, too; wall time then says nothing. Commands and checkouts take turns.

`--cold` measures `aprlab run` up to its first token instead, wall and processor time: the first time on a machine, with no
compiled kernel on disk; then again; and with all kernels compiled from their sources (where the checkout knows
APRLAB_KERNEL_CACHE).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--against", type=Path, action="append", default=[], help="another checkout, to be measured in turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="the first start of `run`, with an empty cache of kernels")
    given = parser.parse_args()
    trees = [HERE, *(path.resolve() for path in given.against)]
    if given.cold:
        cold(given.model.resolve(), trees, given.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = str(given.model.resolve())
        commands = {
            "--version": ["--version"],
            "inspect": ["inspect", model],
            "convert": ["convert", model, "-o", str(Path(folder) / "out.apr"), "--force"],
        }
        took: dict[tuple[str, Path], list[float]] = {(name, tree): [] for name in commands for tree in trees}
        for turn in range(given.rounds + 1):
            for name, command in commands.items():
                for tree in trees:
                    seconds, _ = seconds_of([sys.executable, "-m", "aprlab", *command], tree)
                    if turn:  # the first fills caches: compiled modules, pages of the file
                        took[name, tree].append(seconds)
    print("| command | " + " | ".join(tree.name for tree in trees) + " |")
    print("|---|" + "---|" * len(trees))
    for name in commands:
        cells = (took[name, tree] for tree in trees)
        print(f"| `{name}` | " + " | ".join(f"{statistics.median(t):.2f} ({min(t):.2f} … {max(t):.2f})" for t in cells) + " |")


def cold(model: Path, trees: list[Path], rounds: int) -> None:
    """First, second and compiled start of `run`, one token, in turn over the checkouts; the file is in memory after the first."""
    command = [sys.executable, "-m", "aprlab", "run", str(model), "-p", "What is 2+2?", "-n", "1"]
    took: dict[tuple[str, Path], list[tuple[float, float]]] = {}
    model.read_bytes()
    for _ in range(rounds):
        for tree in trees:
            with tempfile.TemporaryDirectory() as folder:
                for name, more in (("first start", {}), ("second start", {}), ("compiled", {"APRLAB_KERNEL_CACHE": "off"})):
                    found = seconds_of(command, tree, {"NUMBA_CACHE_DIR": folder, "OPENBLAS_NUM_THREADS": "1", **more})
                    took.setdefault((name, tree), []).append(found)
    print(f"load average {os.getloadavg()[0]:.1f}\n\n| `run -n 1` | checkout | processor, s | wall, s |\n|---|---|---|---|")
    for (name, tree), pairs in took.items():
        cells = (f"{statistics.median(t):.2f} ({min(t):.2f} … {max(t):.2f})" for t in zip(*pairs, strict=True))
        print(f"| {name} | {tree.name} | {' | '.join(cells)} |")


def seconds_of(command: list[str], tree: Path, more: dict[str, str] | None = None) -> tuple[float, float]:
    """User and system time, and wall time, of a command that runs in a checkout, with its package."""
    environment = os.environ | {"PYTHONPATH": str(tree)} | (more or {})
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} in {tree}: {said.decode(errors='replace')}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began


if __name__ == "__main__":
    main()
