"""Hostile files through every verb that takes a file: one clear line, or the right answer, in bounded time and memory.

    python tests/trust/every_verb.py                      # the files that it makes; a table
    python tests/trust/every_verb.py --files FOLDER       # files of your own
    python tests/trust/every_verb.py --only names --verbs peel,run --json

Each run is a fork of this process, which has everything imported, in a folder of its own. What it used is measured on the
fork: seconds of the processor, and the peak of memory (the parent's share included).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # a fork has none of its parent's threads
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import hostile  # noqa: E402

from aprlab import onion, paths  # noqa: E402
from aprlab.cli.app import main as command  # noqa: E402
from aprlab.display.plain_text import printable  # noqa: E402

SECONDS, MEGABYTES, MOST = 2.0, 300, 60
STATUSES = {0, 1, 2, 3, 4}
# what a terminal obeys, but for line feed and tab
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_USED = (onion, hostile)

SOUND = str(paths.embedded_model())
SHORT = ["-p", "Hi", "-n", "4"]
# what is typed, FILE in its place; "out" is where something may be written
MODEL_VERBS: dict[str, list[str]] = {
    "inspect": ["inspect", "FILE"],
    "inspect --json": ["inspect", "FILE", "--json"],
    "fingerprint": ["fingerprint", "FILE"],
    "fingerprint --json": ["fingerprint", "FILE", SOUND, "--json"],
    "diff": ["diff", "FILE", SOUND],
    "diff --json": ["diff", SOUND, "FILE", "--json"],
    "check": ["check", "FILE"],
    "check --json": ["check", "FILE", "--json"],
    "run": ["run", "FILE", *SHORT],
    "run --json": ["run", "FILE", *SHORT, "--json"],
    "peel": ["peel", "FILE"],
    "peel two": ["peel", SOUND, "FILE"],
    "peel --json": ["peel", "FILE", SOUND, "--json"],
    "convert": ["convert", "FILE", "-o", "out.apr"],
    "export": ["export", "FILE", "-o", "out.gguf"],
    "safetensors": ["export", "FILE", "-o", "out", "--format", "safetensors", "--dtype", "f32"],
    "trace": ["trace", "FILE", "-o", "out.npz", "--source", "reference"],
    "repair": ["repair", "FILE", "-o", "out.apr", "--reference", SOUND],
    "gates": ["gates", SOUND, "FILE", "-n", "2"],
    "verify": ["verify", "FILE", SOUND, "--out", "out"],
    "forensics": ["forensics", "FILE", "--saw", "garbage", "--only", "rope-norm"],
}
LAUNCH = ["--entry", "k", "--grid", "1", "--block", "32", "--arg", "out"]
OTHER_VERBS: dict[str, dict[str, list[str]]] = {
    ".ptx": {
        "entries": ["ptx", "entries", "FILE"],
        "run": ["ptx", "run", "FILE", *LAUNCH],
        "check": ["ptx", "check", "FILE", *LAUNCH],
    },
    ".yaml": {"sweep": ["sweep", "FILE", "--out", "out"], "qualify": ["qualify", SOUND, "--playbook", "FILE", "--out", "out"]},
    ".npz": {"compare": ["compare", "FILE", "FILE"], "compare --json": ["compare", "FILE", "FILE", "--json"]},
}


@dataclass
class Seen:
    """One verb on one file: what it took, what it said last, and what is wrong with that."""

    file: str
    verb: str
    status: int
    seconds: float
    megabytes: int
    said: str
    wrong: list[str] = field(default_factory=list)


def verbs_of(file: Path) -> dict[str, list[str]]:
    """The verbs that take such a file."""
    return OTHER_VERBS.get(file.suffix, MODEL_VERBS)


def look(file: Path, verb: str, words: list[str], run: Callable[[list[str]], object] = command) -> Seen:
    """Run one verb on a file, in a fork and a folder of its own."""
    with tempfile.TemporaryDirectory() as place, open(f"{place}/1", "w+b") as out, open(f"{place}/2", "w+b") as err:
        work = Path(place) / "work"
        work.mkdir()
        if not (pid := os.fork()):
            _child(work, out.fileno(), err.fileno(), [str(file) if word == "FILE" else word for word in words], run)
        ends = time.monotonic() + 20 * MOST  # the limit of the processor's time comes first where it can
        while not (found := os.wait4(pid, os.WNOHANG))[0]:
            if time.monotonic() > ends:
                os.kill(pid, 9)
            time.sleep(0.01)
        _, status, used = found
        out.seek(0)
        err.seek(0)
        told, complained = out.read().decode("utf-8", "surrogateescape"), err.read().decode("utf-8", "surrogateescape")
        left = sorted(path.name for path in work.iterdir())
    lines = [line for line in complained.splitlines() if line.strip()]
    last = (lines or told.splitlines() or [""])[-1].replace(str(file.parent), "…")
    seconds, peak = used.ru_utime + used.ru_stime, used.ru_maxrss // 1024
    code = os.waitstatus_to_exitcode(status)
    seen = Seen(file.name, verb, code, round(seconds, 2), peak, last[:300])
    seen.wrong = list(_wrong(seen, told, complained, left, "--json" in words))
    return seen


def _child(work: Path, out: int, err: int, words: list[str], run: Callable[[list[str]], object]) -> None:
    status = 70
    try:
        os.chdir(work)
        os.environ["TMPDIR"] = str(work.parent)
        tempfile.tempdir = None
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CPU, (MOST, MOST))
        for number, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        run(words)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 71
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wrong(seen: Seen, told: str, complained: str, left: list[str], as_json: bool) -> Iterator[str]:
    if seen.status not in STATUSES:
        yield f"status {seen.status}"
    if "Traceback" in complained:
        yield "a traceback"
    if seen.status == 2 and sum(line.startswith("aprlab:") for line in complained.splitlines()) != 1:
        yield "not one line"
    if " --help)" in complained:
        yield "typer refused the command line, the file was not opened"
    if found := OBEYED.search(told + complained):
        yield f"the terminal obeys {found.group()!r}"
    if as_json:
        try:
            json.loads(told, parse_constant=_refuse)
        except ValueError as error:
            yield f"not JSON: {error}"
    if any(name not in ("out", "out.apr", "out.gguf", "out.npz", "reports") for name in left):
        yield f"left {left}"
    if seen.status == 2 and left:
        yield f"refused, and left {left}"
    if seen.seconds > SECONDS:
        yield f"{seen.seconds} s"
    if seen.megabytes > MEGABYTES:
        yield f"{seen.megabytes} MB"


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=Path, help="A folder of files; without it they are made.")
    parser.add_argument("--only", default="", help="Files whose name begins so.")
    parser.add_argument("--verbs", default="", help="These only, with commas.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = options.verbs.split(",") if options.verbs else None
    seen: list[Seen] = []
    with tempfile.TemporaryDirectory() as place:
        files = sorted(options.files.iterdir()) if options.files else hostile.make(Path(place))
        for file in files:
            for verb, words in verbs_of(file).items():
                if file.name.startswith(options.only) and (chosen is None or verb in chosen):
                    seen.append(s := look(file, verb, words))
                    if not options.json:
                        mark = f" **{'; '.join(s.wrong)}**" if s.wrong else ""
                        took = f"{s.status} | {s.seconds} | {s.megabytes}"
                        print(f"| {printable(s.file)} | {verb} | {took} | {s.said}{mark} |", flush=True)
    if options.json:
        print(json.dumps([asdict(each) for each in seen]))
    else:
        worst = max((s.seconds for s in seen), default=0), max((s.megabytes for s in seen), default=0)
        print(f"{len(seen)} runs, {sum(bool(s.wrong) for s in seen)} wrong; at most {worst[0]} s and {worst[1]} MB")
    return int(not seen or any(s.wrong for s in seen))


if __name__ == "__main__":
    sys.exit(main())
