"""Time of whole commands, start and all: `python benchmarks/bench_start.py MODEL.gguf [--against CHECKOUT] [--cold]`.

Processor seconds (user and system, of the process and its threads) say what a command costs on a machine that is busy with other
things, too; wall time then says nothing. Commands and checkouts take turns. `--only` takes some of the commands, by the
beginning of their names.

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
    parser.add_argument("--only", action="append", help="commands whose names begin so")
    parser.add_argument("--cold", action="store_true", help="the first start of `run`, with an empty cache of kernels")
    given = parser.parse_args()
    trees = [HERE, *(path.resolve() for path in given.against)]
    if given.cold:
        cold(given.model.resolve(), trees, given.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            name: command for name, command in whole_commands(given.model.resolve(), Path(folder)).items()
            if not given.only or name.startswith(tuple(given.only))
        }  # fmt: skip
        took: dict[tuple[str, Path], list[tuple[float, float]]] = {}
        for turn in range(given.rounds + 1):
            for name, command in commands.items():
                for tree in trees:
                    found = seconds_of([sys.executable, "-m", "aprlab", *command], tree)
                    if turn:  # the first fills caches: compiled modules, pages of the file
                        took.setdefault((name, tree), []).append(found)
    print(f"load average {os.getloadavg()[0]:.1f}, {given.rounds} rounds: median (smallest … largest), s\n")
    print("| command | " + " | ".join(f"{tree.name}: processor | wall" for tree in trees) + " |")
    print("|---|" + "---|---|" * len(trees))
    for name in commands:
        cells = (spread(part) for tree in trees for part in zip(*took[name, tree], strict=True))
        print(f"| `{name}` | " + " | ".join(cells) + " |")


def spread(values: tuple[float, ...]) -> str:
    """Median, smallest, largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def whole_commands(model: Path, folder: Path) -> dict[str, list[str]]:
    """What is timed, by name; the conversions that `peel` looks at are made here."""
    source, out = str(model), {name: str(folder / f"{name}.apr") for name in ("out", "healthy", "faulty")}
    for name, more in (("healthy", []), ("faulty", ["--fault", "GH-191,q4k-min-lost"])):
        seconds_of([sys.executable, "-m", "aprlab", "convert", source, "-o", out[name], *more], HERE)
    return {
        "--version": ["--version"],
        "inspect": ["inspect", source],
        "convert": ["convert", source, "-o", out["out"], "--force"],
        "fingerprint": ["fingerprint", source],
        "peel, healthy pair": ["peel", source, out["healthy"]],
        "peel, two faults": ["peel", source, out["faulty"]],
        "investigate, embedded": ["investigate", "--out", str(folder / "found")],
    }


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
        print(f"| {name} | {tree.name} | {' | '.join(map(spread, zip(*pairs, strict=True)))} |")


def seconds_of(command: list[str], tree: Path, more: dict[str, str] | None = None) -> tuple[float, float]:
    """User and system time, and wall time, of a command that runs in a checkout, with its package."""
    environment = os.environ | {"PYTHONPATH": str(tree)} | (more or {})
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):  # 3: a fault was found, as it should
        sys.exit(f"{' '.join(command)} in {tree}: {said.decode(errors='replace')}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began


if __name__ == "__main__":
    main()
