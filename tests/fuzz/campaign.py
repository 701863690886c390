"""A million mutants of the stored corpus, each with limits on time and memory, in a run that can be stopped and resumed.

    python tests/fuzz/campaign.py --mutants 1000000 --state campaign.json
    python tests/fuzz/campaign.py --state campaign.json --table     # what it has seen so far

The mutants of a target come in batches; a batch is the same for the same seed and number. Each batch runs in a fork of
this process: a mutant that takes more than 2 seconds of the processor or 300 MB of memory is a finding, and so is one
that ends the fork, which goes on with the mutant after it. The state is written after each batch, by rename.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from mutants import CORPUS, TEXT, mutants  # noqa: E402
from targets import CORPUS_OF, TARGETS, run  # noqa: E402

SECONDS, MEGABYTES = 2.0, 300
STUCK = 120.0  # seconds of the clock without a mutant done: the fork is killed
BATCH = 1000
# Of a hundred mutants: those of YAML and PTX take longest and have the smallest readers.
SHARES = {"gguf": 16, "apr": 16, "safetensors": 16, "npz": 14, "raw-gguf": 15, "raw-apr": 15, "ptx": 5, "yaml": 3}
_SHARED = struct.Struct("<QQQd")  # mutants done, read, refused, seconds of the slowest


class Slow(BaseException):
    """A mutant took too long. No `Exception`, so that no reader takes it for a broken file."""


@dataclass
class Seen:
    """What became of the mutants of one target so far; `kinds` maps a finding to how often it came and its first file."""

    mutants: int = 0
    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    peak: int = 0
    kinds: dict[str, list[int | str]] = field(default_factory=dict)

    def find(self, kind: str, file: str) -> None:
        """Count a finding."""
        self.kinds[kind] = [int(self.kinds.get(kind, [0])[0]) + 1, self.kinds.get(kind, [0, file])[1]]

    @property
    def neither(self) -> int:
        """How many were neither read nor refused."""
        return self.mutants - self.read - self.refused


def batch(name: str, number: int, seed: int, size: int = BATCH) -> list[bytes]:
    """The mutants of one batch; the stored files take turns."""
    files = sorted(path for path in (CORPUS / CORPUS_OF.get(name, name)).iterdir() if path.is_file())
    source = files[number % len(files)].read_bytes()
    return list(mutants(source, size, f"{name} {seed} {number}", name in TEXT))


def where(error: BaseException) -> str:
    """The kind of a finding: what was raised, and the last place of this project that it passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}aprlab{os.sep}" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "outside"
    return f"{type(error).__name__} at {place}"


def _work(datas: list[bytes], first: int, shared: mmap.mmap, look: Callable[[bytes], str], found: int) -> None:
    """In the fork: one mutant after the other; findings are lines on `found`."""

    def slow(*_: object) -> None:
        raise Slow

    signal.signal(signal.SIGPROF, slow)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEGABYTES * 1_000_000,) * 2)
    for n in range(first, len(datas)):
        _, read, refused, slowest = _SHARED.unpack(shared[: _SHARED.size])
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            outcome = look(datas[n])
            signal.setitimer(signal.ITIMER_PROF, 0)
            read, refused = read + (outcome == "ok"), refused + (outcome != "ok")
        except BaseException as error:  # also Slow and SystemExit
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(found, (json.dumps([n, where(error)]) + "\n").encode())
        slowest = max(slowest, time.process_time() - began)
        shared[: _SHARED.size] = _SHARED.pack(n + 1, read, refused, slowest)


def run_batch(seen: Seen, datas: list[bytes], look: Callable[[bytes], str], keep: Callable[[bytes], str]) -> None:
    """All mutants of a batch, in as many forks as it takes; `keep` stores a mutant and returns its name."""
    with mmap.mmap(-1, mmap.PAGESIZE) as shared:
        done = 0
        while done < len(datas):
            readable, found = os.pipe()
            if not (pid := os.fork()):
                try:
                    _work(datas, done, shared, look, found)
                finally:
                    os._exit(0)
            os.close(found)
            end, usage = _wait(pid, shared)
            reached = int(_SHARED.unpack(shared[: _SHARED.size])[0])
            with os.fdopen(readable, "rb") as lines:
                for line in lines:
                    n, kind = json.loads(line)
                    seen.find(kind, keep(datas[n]))
            if reached < len(datas):
                seen.find(f"the process ended: {end}", keep(datas[reached]))
                reached += 1
                _, *rest = _SHARED.unpack(shared[: _SHARED.size])
                shared[: _SHARED.size] = _SHARED.pack(reached, *rest)
            seen.seconds += usage.ru_utime + usage.ru_stime
            seen.peak = max(seen.peak, usage.ru_maxrss // 1024)
            done = reached
        _, read, refused, slowest = _SHARED.unpack(shared[: _SHARED.size])
        seen.mutants, seen.read, seen.refused = seen.mutants + done, seen.read + read, seen.refused + refused
        seen.slowest = max(seen.slowest, slowest)


def _wait(pid: int, shared: mmap.mmap) -> tuple[str, resource.struct_rusage]:
    """Until the fork ends, or does nothing for too long; how it ended, and what it used."""
    last, since, killed = -1, time.monotonic(), False
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return f"no mutant done in {STUCK:.0f} s" if killed else f"status {code}", usage
        now = int(_SHARED.unpack(shared[: _SHARED.size])[0])
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > STUCK and not killed:
            os.kill(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.01)


def keeper(name: str, place: Path) -> Callable[[bytes], str]:
    """Stores mutants in a folder of the target's name."""

    def keep(data: bytes) -> str:
        file = place / name / hashlib.sha256(data).hexdigest()[:16]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file.name

    return keep


def load(state: Path) -> dict[str, Seen]:
    """The state, or an empty one."""
    stored = json.loads(state.read_text()) if state.is_file() else {}
    return {name: Seen(**stored.get(name, {})) for name in TARGETS}


def store(state: Path, seen: dict[str, Seen]) -> None:
    """Written beside and renamed."""
    part = state.with_suffix(".part")
    part.write_text(json.dumps({name: asdict(each) for name, each in seen.items()}, indent=1))
    part.replace(state)


def campaign(state: Path, total: int, seed: int, place: Path, size: int = BATCH, only: tuple[str, ...] = ()) -> dict[str, Seen]:
    """Batches of all targets until there are so many mutants; the target that is furthest behind its share is next."""
    seen = load(state)
    gc.freeze()
    while True:
        due = {name: total * SHARES[name] // sum(SHARES.values()) for name in only or TARGETS}
        open_ = [name for name in due if seen[name].mutants < due[name]]
        if not open_:
            return seen
        name = min(open_, key=lambda each: seen[each].mutants / due[each])
        datas = batch(name, seen[name].mutants // size, seed, size)
        run_batch(seen[name], datas, lambda data, name=name: run(name, data), keeper(name, place))  # type: ignore[misc]
        store(state, seen)


def table(seen: dict[str, Seen]) -> str:
    """As it is in docs/trust.md."""
    rows = ["| target | mutants | refused | read | a second | slowest, s | peak, MB | neither |", "|---" * 8 + "|"]
    for name, s in seen.items():
        rate = s.mutants / s.seconds if s.seconds else 0
        counts = f"{s.mutants:,} | {s.refused:,} | {s.read:,}"
        rows.append(f"| {name} | {counts} | {rate:,.0f} | {s.slowest:.2f} | {s.peak} | {s.neither} |")
        rows += [f"    {kind}: {times} times, first {file}" for kind, (times, file) in s.kinds.items()]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutants", type=int, default=1_000_000, help="Of all targets together.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, default=Path("campaign.json"))
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true", help="Print what the state holds, run nothing.")
    options = parser.parse_args()
    only = tuple(filter(None, options.only.split(",")))
    found = HERE / "found"
    seen = load(options.state) if options.table else campaign(options.state, options.mutants, options.seed, found, only=only)
    print(table(seen))
    return int(any(each.neither for each in seen.values()))


if __name__ == "__main__":
    sys.exit(main())
