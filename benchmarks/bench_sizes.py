"""What each size costs: a file of true inventory is made, copied, converted, checked, fingerprinted, exported and run once.

    python benchmarks/bench_sizes.py qwen2.5-coder-3b --dir /scratch     # measure; results go into docs/sizes.json
    python benchmarks/bench_sizes.py qwen2.5-coder-3b --ratios 7          # copy, convert, export in turn: medians, printed
    python benchmarks/bench_sizes.py --write                             # docs/sizes.md and docs/sizes.svg from them

Every step runs in a fresh process, which tells its own wall and processor seconds and its peak memory (VmHWM). Each size needs
room for two files at a time, three for a moment; all are deleted. A step that was measured is not measured again
(`--again`). Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS = DOCS / "sizes.json"
CODE = {
    "synth": "from aprlab.conversion.synthetic import synth; synth(name, gguf, force=True)",
    "copy": "import shutil; shutil.copyfile(gguf, copy); f = open(copy, 'rb+'); os.fsync(f.fileno())",
    "convert": "from aprlab.conversion import convert; r = convert(gguf, apr, force=True); assert r.reversible",
    "check": "from aprlab.formats import open_model; m = open_model(apr); m.config, m.tokenizer; m.check_values()",
    "peel": "from aprlab.onion import peel; v = peel(gguf, apr); assert v.verdict == 'same', v.verdict",
    "verify": (
        "from aprlab.qualification.certificate import verify; found = verify(gguf, apr, tokens=64); "
        "assert found.verdict == 'certified', found.verdict; note = '64 tokens'"
    ),
    "export": "from aprlab.conversion import export; r = export(apr, back, force=True); assert r.reversible",
    "compare": "from aprlab.model.hub import sha256; assert sha256(gguf) == sha256(back)",
    "token": (
        "from aprlab.formats import open_model; from aprlab.inference.session import Session; from aprlab.tracing import trace; "
        "s = Session(open_model(apr), engine='jit', threads=threads, stream=True); t = trace(s, [42], '*'); "
        "assert all(x.nan == x.inf == 0 for x in t.summary()); note = f'{len(t)} points'"
    ),
    "fingerprint": "from aprlab.instruments import fingerprint; p = fingerprint(apr); assert all(not x.seen.nan for x in p)",
}


def step(name: str, what: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run one step in a process of its own."""
    paths = {key: str(folder / file) for key, file in
             {"gguf": "m.gguf", "apr": "m.apr", "copy": "c.gguf", "back": "b.gguf"}.items()}  # fmt: skip
    head = f"import os, re, time; threads = {threads}; note = ''\n" + "".join(f"{k} = {v!r}\n" for k, v in paths.items())
    head += f"name = {name!r}\nw, c = time.perf_counter(), time.process_time()\n"
    tail = (
        "\nw, c = time.perf_counter() - w, time.process_time() - c\n"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "print(__import__('json').dumps({'seconds': w, 'processor': c, 'peak': peak * 1024, 'note': note}))"
    )
    done = subprocess.run([sys.executable, "-c", head + CODE[what] + tail], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}, {what}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, parent: Path, threads: int, again: bool, steps: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    mine = results.setdefault(name, {})
    todo = [what for what in CODE if what in steps and (again or what not in mine)]
    if not todo:
        return
    with tempfile.TemporaryDirectory(dir=parent, prefix="aprlab-sizes-") as made:
        folder = Path(made)
        for what in CODE:
            needed = what in todo or what in ("synth", "convert") or (what == "export" and "compare" in todo)
            if not needed:
                continue
            found = step(name, what, folder, threads)
            if what == "synth":
                mine["bytes"] = (folder / "m.gguf").stat().st_size
            if what == "copy":
                (folder / "c.gguf").unlink()
            if what == "compare":
                (folder / "b.gguf").unlink()
                (folder / "m.gguf").unlink()
            if what in todo:
                mine[what] = found
                print(f"{name} {what:12}{found['seconds']:8.1f} s {found['processor']:8.1f} s processor "
                      f"{found['peak'] / 2**20:7.0f} MiB", flush=True)  # fmt: skip
                mine["machine"] = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}"
                results = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | {name: mine}  # others may write, too
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def ratios(name: str, parent: Path, threads: int, rounds: int) -> None:
    """Copying, converting and exporting one after the other, again and again; medians as multiples of copying."""
    made = {"copy": "c.gguf", "convert": "m.apr", "export": "b.gguf"}
    seconds: dict[str, list[float]] = {what: [] for what in made}
    with tempfile.TemporaryDirectory(dir=parent, prefix="aprlab-sizes-") as folder:
        step(name, "synth", Path(folder), threads)
        for _ in range(rounds):
            for what in made:
                seconds[what].append(step(name, what, Path(folder), threads)["seconds"])
                if what == "copy":  # or three copies would fill the page cache
                    (Path(folder) / made[what]).unlink()
            for what in ("convert", "export"):
                (Path(folder) / made[what]).unlink()
    copying = statistics.median(seconds["copy"])
    for what, seen in seconds.items():
        ends = f"{min(seen):.2f} to {max(seen):.2f} s"
        print(f"{name} {what:12}{statistics.median(seen) / copying:6.1f} copies, {ends}, {rounds} rounds", flush=True)


def write() -> None:
    """docs/sizes.md between its marks, and the figure."""
    read: dict[str, Any] = json.loads(RESULTS.read_text())
    results = dict(sorted(read.items(), key=lambda item: item[1]["bytes"]))
    page = DOCS / "sizes.md"
    text = page.read_text()
    for mark, lines in (("measured", _table(results)), ("inventory", _inventories())):
        between = "\n".join(lines)
        found = re.compile(f"(<!-- {mark} -->\n).*?(<!-- end {mark} -->)", re.DOTALL)
        text = found.sub(lambda m, between=between: f"{m[1]}{between}\n{m[2]}", text)  # type: ignore[misc]
    page.write_text(text)
    _figure(results)


def _inventories() -> list[str]:
    from aprlab.conversion.synthetic import config_of, counts
    from aprlab.published import known_models

    rows = ["| model | layers | parameters in the file | inner | tensors by type | bytes of data |", "|---|---|---|---|---|---|"]
    for name, known in known_models().items():
        config = config_of(known)
        seen = counts(config)
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(seen["tensors"].items(), key=lambda item: -item[1]))
        rows.append(f"| {name} | {config.block_count} | {seen['parameters']:,} | {seen['inner']:,} | {kinds} "
                    f"| {sum(seen['bytes'].values()):,} |")  # fmt: skip
    return rows


def _table(results: dict[str, Any]) -> list[str]:
    rows = ["| model | step | seconds | processor seconds | MB a processor second | peak memory, MiB |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for name, mine in results.items():
        for what in CODE:
            if what in mine:
                x = mine[what]
                speed = mine["bytes"] / x["processor"] / 1e6
                rows.append(f"| {name}, {mine['bytes'] / 1e9:.2f} GB | {what} | {x['seconds']:.1f} | {x['processor']:.1f} "
                            f"| {speed:.0f} | {x['peak'] / 2**20:.0f} |")  # fmt: skip
    rows += ["", "Growth with the size of the file, by straight lines of least squares: processor seconds that any file",
             "costs, and seconds a GB; the share of the spread that this line explains (R², 1 is a straight line); how memory",
             "grows; time by the clock as a multiple of copying (with fsync) the same file, smallest file first.", "",
             "| step | seconds at 0 | seconds a GB | R² | MiB a GB | times copying |", "|---|---|---|---|---|---|"]  # fmt: skip
    for what in CODE:
        seen = [mine for mine in results.values() if what in mine]
        if len(seen) < 2:
            continue
        sizes = [mine["bytes"] / 1e9 for mine in seen]
        start, slope, straight = _line(sizes, [mine[what]["processor"] for mine in seen])
        memory = _line(sizes, [mine[what]["peak"] / 2**20 for mine in seen])[1]
        copies = ", ".join(f"{mine[what]['seconds'] / mine['copy']['seconds']:.1f}" for mine in seen if "copy" in mine)
        rows.append(f"| {what} | {start:.1f} | {slope:.2f} | {straight:.3f} | {memory:+.0f} | {copies} |")
    return rows


def _line(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Start, slope and R² of the straight line of least squares."""
    slope, start = statistics.linear_regression(x, y)
    return start, slope, statistics.correlation(x, y) ** 2


def _figure(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "aprlab"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for what, mark in zip(CODE, "osv^XD<>Ph", strict=True):
        points = sorted((mine["bytes"] / 1e9, mine[what]) for mine in results.values() if what in mine)
        sizes = [x for x, _ in points]
        left.plot(sizes, [p["processor"] for _, p in points], marker=mark, label=what)
        right.plot(sizes, [p["peak"] / 2**20 for _, p in points], marker=mark, label=what)
    left.set(xlabel="size of the file, GB", ylabel="processor seconds", xscale="log", yscale="log")
    sizes = sorted(mine["bytes"] / 1e9 for mine in results.values())
    left.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
    left.minorticks_off()
    right.set(xlabel="size of the file, GB", ylabel="peak memory, MiB", xscale="log", yscale="log")
    right.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
    right.minorticks_off()
    right.axhline(300, color="0.5", linewidth=0.8, linestyle=":")
    left.legend(fontsize=7, ncols=2)
    figure.savefig(DOCS / "sizes.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of data/models.toml")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--steps", nargs="*", default=list(CODE), choices=list(CODE))
    parser.add_argument("--ratios", type=int, metavar="ROUNDS", help="copies that convert and export take; writes nothing")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for name in options.models:
        print(f"{shutil.disk_usage(options.dir).free / 1e9:.0f} GB free in {options.dir}")
        if options.ratios:
            ratios(name, options.dir, options.threads, options.ratios)
        else:
            measure(name, options.dir, options.threads, options.again, options.steps)
    if options.write:
        write()


if __name__ == "__main__":
    main()
