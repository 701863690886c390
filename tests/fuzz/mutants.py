"""Mutants of the stored corpus through every target, without coverage: many, fast, the same for the same seed.

    python tests/fuzz/mutants.py --mutants 1000000          # over all targets, as many in each
    python tests/fuzz/mutants.py --only ptx --seconds 60

An `AprlabError` of one line is a right answer, and so is a file that is read; everything else is written beside and printed.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from targets import CORPUS_OF, TARGETS, run  # noqa: E402

CORPUS = HERE / "corpus"
NUMBERS = [0, 1, 2, 3, 0x7F, 0x80, 0xFF, 2**15, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
WORDS = [b"0", b"-1", b"9" * 40, b"1e999", b"NaN", b"null", b"[", b"{", b"]", b"}", b'"', b"\\u0000", b"\\ud800", b"\x00",
         b"\xff", b"\n", b"&a ", b"*a", b"!!int ", b"/*", b"*/", b"%r<9>", b"call f;", b";", b",", b":", b"- "]  # fmt: skip
TEXT = {"yaml", "ptx"}


@dataclass
class Count:
    """What became of the mutants of one target; `found` holds what is neither read nor refused."""

    name: str
    mutants: int = 0
    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    found: list[str] = field(default_factory=list)


def mutants(source: bytes, count: int, seed: int | str, text: bool = False) -> Iterator[bytes]:
    """So many changed copies: bits, numbers of 1 to 8 bytes, cuts, copies of a part, words, one to four of them at a time."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(source)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
            _change(data, rng, text)
        yield bytes(data)


def _change(data: bytearray, rng: random.Random, text: bool) -> None:
    # most rules are about the front of a file: half of the places are there
    size = max(len(data), 1)
    at = rng.randrange(min(size, 4096)) if rng.random() < 0.5 else rng.randrange(size)
    kind = rng.randrange(4, 9) if text else rng.randrange(9)
    if kind in (0, 1):
        data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ 1 << rng.randrange(8)])
    elif kind in (2, 3):
        width = rng.choice((1, 2, 4, 8))
        data[at : at + width] = (rng.choice(NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    elif kind == 4:
        del data[at : len(data) if rng.random() < 0.3 else at + rng.randrange(1, 70)]
    elif kind == 5:
        part = data[at : at + rng.randrange(1, 200)]
        data[rng.randrange(len(data) + 1) : 0] = part * rng.choice((1, 1, 2, 50))
    elif kind == 6:
        data[at : at + rng.randrange(0, 4)] = rng.choice(WORDS)
    elif kind == 7:
        other = rng.randrange(len(data) + 1)
        width = rng.randrange(1, 64)
        data[at : at + width] = data[other : other + width]
    else:
        data[at:at] = bytes([rng.randrange(256)])


def sweep(name: str, *, mutants_at_most: int, seconds: float, seed: int) -> Count:
    """Mutants of every stored file of a target, in turn, until there are enough or the time is up."""
    count, ends = Count(name), time.monotonic() + seconds
    files = sorted(path for path in (CORPUS / CORPUS_OF.get(name, name)).iterdir() if path.is_file())
    each = -(-mutants_at_most // len(files))
    sources = [mutants(path.read_bytes(), each, seed + n, name in TEXT) for n, path in enumerate(files)]
    for batch in zip(*sources, strict=True):
        for data in batch:
            if time.monotonic() > ends:
                return count
            _one(count, name, data)
    return count


def _one(count: Count, name: str, data: bytes) -> None:
    count.mutants += 1
    began = time.process_time()
    try:
        outcome = run(name, data)
    except Exception as error:
        count.found.append(f"{name} {hashlib.sha256(data).hexdigest()[:16]}: {type(error).__name__}: {error}")
        keep = HERE / "found" / name
        keep.mkdir(parents=True, exist_ok=True)
        (keep / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        return
    count.slowest = max(count.slowest, time.process_time() - began)
    if outcome == "ok":
        count.read += 1
    else:
        count.refused += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutants", type=int, default=8000, help="Of all targets together.")
    parser.add_argument("--seconds", type=float, default=1e9, help="At most, for each target.")
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(TARGETS)
    bad = 0
    print("| target | mutants | refused | read | slowest, s | neither |\n|---|---|---|---|---|---|")
    for name in names:
        c = sweep(name, mutants_at_most=options.mutants // len(names), seconds=options.seconds, seed=options.seed)
        print(f"| {name} | {c.mutants:,} | {c.refused:,} | {c.read:,} | {c.slowest:.2f} | {len(c.found)} |", flush=True)
        for line in list(dict.fromkeys(c.found))[:20]:
            print("   ", line)
        bad += len(c.found)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
