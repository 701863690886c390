"""Processor time of whole commands, start and all: `python benchmarks/bench_start.py MODEL.gguf [--against CHECKOUT]`.

Processor seconds (user and system, of the process and its threads) say what a command costs on a machine that is busy with other
things, too; wall time then says nothing. Commands and checkouts take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--against", type=Path, action="append", default=[], help="another checkout, to be measured in turn")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    trees = [HERE, *(path.resolve() for path in given.against)]
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
                    seconds = processor_seconds([sys.executable, "-m", "aprlab", *command], tree)
                    if turn:  # the first fills caches: compiled modules, pages of the file
                        took[name, tree].append(seconds)
    print("| command | " + " | ".join(tree.name for tree in trees) + " |")
    print("|---|" + "---|" * len(trees))
    for name in commands:
        cells = (took[name, tree] for tree in trees)
        print(f"| `{name}` | " + " | ".join(f"{statistics.median(t):.2f} ({min(t):.2f} … {max(t):.2f})" for t in cells) + " |")


def processor_seconds(command: list[str], tree: Path) -> float:
    """User and system time of a command that runs in a checkout, with its package."""
    process = subprocess.Popen(
        command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} in {tree}: {said.decode(errors='replace')}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
