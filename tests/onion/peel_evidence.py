"""How well `peel` names what it was not told: all faults alone, pairs of them, healthy variants.

``python tests/onion/peel_evidence.py`` prints the table of `docs/peel.md`. A row knows which faults were put in; `peel`
gets two paths or two sessions and nothing else.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from aprlab import paths
from aprlab.conversion.converter import convert
from aprlab.errors import AprlabError
from aprlab.faults import FAULTS, convert_with, file_faults, run_faults, session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.lab.pairs import given_for
from aprlab.model.model import Model
from aprlab.onion.peeling import peel
from aprlab.onion.run_peeling import peel_sessions
from aprlab.onion.verdict import Verdict

PROMPT = "What is 2+2?"
TOKENS = 4  # of the answer: enough to tell any of these apart
ALIKE = ("leaves_the_same_file_as", "computes_the_same_as")


@dataclass(frozen=True)
class Row:
    """One experiment: what was put in, and what came out."""

    form: str  # "file" or "run"
    put: tuple[str, ...]
    verdict: Verdict

    @property
    def named(self) -> bool:
        """Each fault under its id (or one that leaves the same file), in its layer, and nothing else."""
        findings = [f for f in self.verdict.findings if f.fault is not None]
        names = [{f.fault, *(id for key in ALIKE for id in f.evidence.get(key, []))} for f in findings]
        layers = all(f.layer == FAULTS[f.fault].layer for f in findings if f.fault is not None)
        strange = [f for f in self.verdict.findings if f.fault is None and not f.harmless]
        found = all(any(id in some for some in names) for id in self.put)
        return found and layers and len(findings) == len(self.put) and not strange

    @property
    def repaired(self) -> bool:
        """A minimal repair restores the golden rule; or the fault changes nothing that a run could notice."""
        if self.verdict.verdict == "equivalent":
            return True
        r = self.verdict.repair
        return r is not None and r.minimal and all(r.proof["after"].get(key) for key in ("ids", "tokens", "text"))

    @property
    def essence(self) -> Any:
        """All of the verdict but words and seconds."""
        v = self.verdict
        findings = [(f.layer, f.fault, f.cause.key, f.tensors, f.harmless, f.ambiguous, f.confidence) for f in v.findings]
        parts = [[part.key for part in f.evidence.get("mechanisms", [])] for f in v.findings]
        repair = None if v.repair is None else (v.repair.set, v.repair.minimal, v.repair.proof["sets_run"])
        return v.verdict, findings, parts, repair

    def __str__(self) -> str:
        state = f"{'named' if self.named else 'MISSED'}, {'repaired' if self.repaired else 'NOT REPAIRED'}"
        return f"{self.form} {'+'.join(self.put)}: {state}; {self.verdict.verdict}, {self.verdict.faults}"


@cache
def reference() -> Model:
    return open_model(paths.embedded_model())


@cache
def believed() -> Session:
    return Session(reference(), threads=1)


def file_row(folder: Path, ids: tuple[str, ...], **options: Any) -> Row | None:
    """A file with these faults, peeled; None where they do not go together or one hides the other without a trace."""
    path = folder / "broken.apr"
    try:
        given = given_for([FAULTS[id] for id in ids])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_with(reference(), path, ids, force=True, **given)
    except AprlabError:
        return None
    if len(ids) > 1 and _hash(path) in {single(folder, id, tuple(given.items())) for id in ids}:
        return None  # the file is that of one fault alone
    return Row("file", ids, peel(reference(), path, threads=1, prompt=PROMPT, max_tokens=TOKENS, **options))


@cache
def single(folder: Path, id: str, given: tuple[tuple[str, Any], ...]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_with(reference(), folder / "one.apr", [id], force=True, **dict(given))
    except AprlabError:
        return ""
    return _hash(folder / "one.apr")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_row(ids: tuple[str, ...]) -> Row | None:
    """An engine with these faults on the healthy file, compared with the healthy engine."""
    try:
        broken = session_with(believed(), ids)
    except AprlabError:
        return None
    return Row("run", ids, peel_sessions(believed(), broken, prompt=PROMPT, max_tokens=TOKENS))


def file_singles(folder: Path) -> Iterator[Row]:
    """Every fault that this model can have in a file."""
    for id in file_faults():
        if (row := file_row(folder, (id,))) is not None:
            yield row


def singles(folder: Path) -> Iterator[Row]:
    """Every fault that this model can have, in each of its forms."""
    yield from file_singles(folder)
    for id in run_faults():
        if (row := run_row((id,))) is not None:
            yield row


def pairs(folder: Path, files: int = 36, runs: int = 28) -> Iterator[Row]:
    """Pairs that walk through the whole catalogue by strides, so that every fault meets others of other layers."""
    plain = [id for id, f in file_faults().items() if not f.given]
    yield from _strides(plain, files, lambda ids: file_row(folder, ids))
    yield from _strides(list(run_faults()), runs, run_row)


def _strides(ids: list[str], wanted: int, make: Any) -> Iterator[Row]:
    done: set[frozenset[str]] = set()
    for stride in (11, 5, 17, 3, 23):
        for n, id in enumerate(ids):
            if len(done) == wanted:
                return
            pair = (id, ids[(n + stride) % len(ids)])
            if n % 2 == (stride % 4 == 1) and frozenset(pair) not in done and (row := make(pair)) is not None:
                done.add(frozenset(pair))
                yield row


def healthy(folder: Path) -> Iterator[tuple[str, Verdict]]:
    """Files that are other bytes and the same model."""
    variants: dict[str, dict[str, Any]] = {
        "as it is": {}, "other dialect": {"dialect": "realizar"}, "zstd": {"compress": "zstd"}, "lz4": {"compress": "lz4"},
        "metadata in another order": {"seams": _reordered}, "q8_0": {"quantize": "q8_0"}, "q6k": {"quantize": "q6k"},
        "q4_0": {"quantize": "q4_0"}, "q5_0": {"quantize": "q5_0"}, "f16": {"quantize": "f16"}, "aprq4": {"quantize": "aprq4"},
    }  # fmt: skip
    for name, options in variants.items():
        path = folder / "healthy.apr"
        convert(reference(), path, force=True, **options)
        yield name, peel(reference(), path, threads=1, prompt=PROMPT, max_tokens=TOKENS)


def _reordered(seams: Any) -> Any:
    from dataclasses import replace

    return replace(seams, metadata=lambda metadata: dict(reversed(metadata.items())))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, source in (("pair", pairs(folder)), ("single", singles(folder))):
            rows: list[Row] = []
            for row in source:
                rows.append(row)
                print(row, f"{sum(row.verdict.seconds.values()):.1f} s", file=sys.stderr, flush=True)
            for form in ("file", "run"):
                some = [r for r in rows if r.form == form]
                named, repaired = sum(r.named for r in some), sum(r.repaired for r in some)
                print(f"| {title}, {form} | {len(some)} | {named} | {repaired} |", flush=True)
        for name, verdict in healthy(folder):
            print(f"| healthy: {name} | {verdict.verdict} | {len(verdict.findings)} |", flush=True)


if __name__ == "__main__":
    main()
