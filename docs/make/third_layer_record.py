"""The evidence of `docs/third-layer.md`, measured and written down: `data/third-layer.json` is made here and nowhere else.

    python docs/make/third_layer_record.py MODEL.gguf data/third-layer.json [PART ...]

Parts are those of `PARTS`; without any, all are measured. A part that is measured again replaces its older self, the
others stay. On two cores the whole takes about an hour with Qwen2.5-Coder-1.5B-Instruct (Q4_K_M).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import aprlab
from aprlab.errors import UsageError
from aprlab.faults import run_faults
from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.ranking import FITS, Forensics, forensics
from aprlab.formats import open_model
from aprlab.formats.writing import write_json
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.paths import cores

PROMPT = "What is 2+2?"
# What the ticket shows, in its own words; but for `ичество`, which it prints as the vocabulary spells it.
TICKET = {
    "third layer": "3,}, helf helf.How helf",
    "old file": "1. What is the difference between a class and",
    "second layer": "türleminичество gabantha",
}
LOST = "lost-qkv-biases"
# How upstream ran a converted file on a GPU that week: its own ChatML, control tokens encoded as text, and a loop that fed the
# whole sequence again at every step onto a cache that it never emptied.
LOOP = ("template-hard-coded", "split-specials", "kv-refed")


def _joined(*ids: str) -> str:
    return "+".join(ids)


def _subsets(ids: tuple[str, ...]) -> list[str]:
    """All subsets but the empty one, the largest first."""
    return [_joined(*chosen) for size in range(len(ids), 0, -1) for chosen in combinations(ids, size)]


_EXACT = [LOST, *LOOP]
_OLD = ("prompt-lost", "last-token-twice")
_OTHERS = ("rope-norm", "rope-theta", LOST)
_DECODERS = [id for id, fault in run_faults().items() if fault.registry is not None]
# name -> (which text, options of `forensics`, what it is for)
PARTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ranking": ("third layer", {}, "every fault that a run can have, alone"),
    "exact": (
        "third layer",
        {"faults": [_joined(*_EXACT), *(_joined(*(id for id in _EXACT if id != left)) for left in _EXACT)]},
        "lost biases and upstream's own loop; then each of the four left out in turn",
    ),
    "old file": (
        "old file",
        {"faults": [*_subsets(_OLD), *(_joined(*_OLD, other) for other in _OTHERS), "template-skipped"]},
        "a prompt that never reached the model, in the loop of upstream's CPU path",
    ),
    "second layer": (
        "second layer",
        {"faults": [_joined(LOST, *LOOP[:2], id) for id in _DECODERS]},
        "lost biases, upstream's prompt, and each block decoder that is wrong",
    ),
    "pairs": ("third layer", {}, "the best of `ranking`, and whatever else fits by itself, with every other that could run"),
}  # fmt: skip

ABOUT = """\
Recorded by `python docs/make/third_layer_record.py MODEL.gguf data/third-layer.json`; docs/third-layer.md tells the story.
model: the healthy file: name, sha256, tensors. ticket: the texts of GH-191 by name.
parts: name -> purpose, saw (the text), command (one part alone), date, aprlab (version), engine, contract, threads, cores,
wall_seconds, seconds (processor time), prompt, healthy (the healthy answer), conclusion, suspects.
suspects: best first, each with faults (ids), text and tokens (the answer), cut (why it was left before its end, '' where it was
not), score (0 to 1), shared (rare tokens in common), why (the score in words), seconds (processor time), error (why it could
not run; then there is no score and the text is empty). fits: the score from which on something is explained.\
"""


def paired(ranking: dict[str, Any]) -> list[str]:
    """The promising ones of a recorded ranking, the best and whatever fits by itself, with all others; each pair once."""
    ran = [suspect for suspect in ranking["suspects"] if suspect["error"] is None]
    ids = [_joined(*suspect["faults"]) for suspect in ran]
    promising = max(1, sum(suspect["score"] >= FITS for suspect in ran))
    return [_joined(best, other) for n, best in enumerate(ids[:promising]) for other in ids[n + 1 :]]


def measure(session: Session, name: str, parts: dict[str, Any], progress: Any = None) -> dict[str, Any]:
    """One part, as plain data; `parts` are those that are there already."""
    which, options, purpose = PARTS[name]
    if name == "pairs":
        if "ranking" not in parts:
            raise UsageError("the pairs are made from the ranking: record that first", code="forensics.ranking-not-recorded")
        options = {"faults": paired(parts["ranking"])}
    started = time.perf_counter()
    found: Forensics = forensics(session, TICKET[which], prompt=PROMPT, progress=progress, **options)
    return {
        "purpose": purpose,
        "command": f"python docs/make/third_layer_record.py {session.model.path.name} data/third-layer.json {json.dumps(name)}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "aprlab": aprlab.__version__,
        "engine": session.engine.name,
        "contract": session.engine.contract,
        "threads": session.engine.threads,
        "cores": cores(),
        "wall_seconds": round(time.perf_counter() - started, 1),
        **found.to_json(),
        "seconds": round(found.seconds, 1),
    }


def identity(model: Model) -> dict[str, Any]:
    """Which file it was."""
    with open(model.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": model.path.name, "sha256": digest, "tensors": len(model.tensors), "by_type": model.by_type()}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python docs/make/third_layer_record.py")
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all without any")
    parser.add_argument("--engine", default="jit")
    parser.add_argument("--threads", type=int, default=None)
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    model = open_model(chosen.model)
    session = Session(model, engine=chosen.engine, threads=chosen.threads)
    known = identity(model)
    parts: dict[str, Any] = {}
    if chosen.output.exists():
        old = json.loads(chosen.output.read_text(encoding="utf-8"))
        if old["model"]["sha256"] != known["sha256"]:
            parser.error(f"{chosen.output} was recorded with another model, {old['model']['file']}")
        parts = old["parts"]

    def show(suspect: Suspect) -> None:
        score = f"{suspect.match.score:.2f}" if suspect.match is not None else "  - "
        print(f"  {score} {_joined(*suspect.faults)}: {suspect.text!r} ({suspect.seconds:.0f} s)", flush=True)

    for name in chosen.parts or PARTS:
        print(name, flush=True)
        parts[name] = measure(session, name, parts, show)
        print(f"  {parts[name]['conclusion']} ({parts[name]['seconds']:.0f} s of processor time)", flush=True)
        record = {
            "about": ABOUT.splitlines(), "model": known, "ticket": TICKET, "fits": FITS,
            "parts": {n: parts[n] for n in PARTS if n in parts},
        }  # fmt: skip
        write_json(chosen.output, record)


if __name__ == "__main__":
    main()
