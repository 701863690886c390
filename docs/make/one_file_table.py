"""How well one broken file is judged without a reference: the tables of `docs/peel.md`.

``python docs/make/one_file_table.py [ID ...]`` makes every file fault of the embedded model (or these), gives `peel` that
one file, and asks `repair` for it. ``--pairs`` takes a sample of pairs instead; ``--healthy`` counts false alarms over healthy
variants: those of `tests/laws`, other encodings, noise on all weights, another vocabulary. ``--real`` does the same for the
real 0.5B: some faults of each layer, and its re-encodings. ``--peel`` leaves the repairs out.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import paths
from aprlab.conversion.converter import convert
from aprlab.errors import AprlabError
from aprlab.faults import FAULTS, convert_with, file_faults
from aprlab.formats import open_model
from aprlab.gates import attempt
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.lab.pairs import given_for, named
from aprlab.model.model import Model
from aprlab.onion.peeling import peel
from aprlab.onion.verdict import Verdict
from aprlab.quants import quantise

REF = paths.embedded_model()
REAL = paths.models_dir() / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
REAL_FAULTS = (
    "swapped-k-v", "swapped-gate-up", "swapped-layers", "lost-k-biases", "q5-high-bits", "q4k-min-lost", "permuted-qk",
    "rope-norm", "head-dim-guessed", "scales-flushed", "no-merges", "transposed-embedding",
)  # fmt: skip
PAIRS = 24


def broken_file(ids: tuple[str, ...], folder: Path, source: Path = REF) -> tuple[Path, dict[str, Any]] | None:
    """A file with these faults and the options it was made with; None where they are not for this model, or not together."""
    try:
        given = given_for([FAULTS[id] for id in ids]) if source == REF else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_with(source, folder / "broken.apr", ids, force=True, **given)
    except AprlabError:
        return None
    return folder / "broken.apr", given


def found_by(verdict: Verdict, ids: tuple[str, ...]) -> dict[str, Any]:
    """Which of the faults a verdict has the layer of, and names; of one that no run can notice a harmless finding is right."""
    quiet = {FAULTS[id].layer for id in ids if FAULTS[id].silent}
    layers = {f.layer for f in verdict.findings if not f.harmless or f.layer in quiet}
    return {"layers": [FAULTS[id].layer in layers for id in ids], "names": [id in named(verdict) for id in ids]}


def row(id: str, folder: Path, source: Path = REF, *, repaired: bool = True) -> dict[str, Any] | None:
    """One fault, judged alone; None where it is not for this model."""
    made = broken_file((id,), folder, source)
    if made is None:
        return None
    broken, given = made
    healthy, fixed = folder / "healthy.apr", folder / "fixed.apr"
    fixed.unlink(missing_ok=True)
    if repaired:
        convert(source, healthy, force=True, **given, seams=lambda s: replace(
            s, metadata=lambda made: {k: v for k, v in made.items() if k != "source_metadata"}))  # fmt: skip
    started = time.perf_counter()
    if source == REF and repaired:
        outcome = attempt(broken, fixed, threads=1)
        verdict, written, answer = outcome.verdict, outcome.written is not None, outcome.judged.get("run")
    else:  # a second peel of the repaired file would take as long again
        verdict, written, answer = peel(None, broken, threads=1 if source == REF else 2), False, None
    found = found_by(verdict, (id,))
    return {
        "fault": id, "verdict": verdict.verdict, "layer": found["layers"][0], "named": found["names"][0], "written": written,
        "bits": fixed.is_file() and fixed.read_bytes() == healthy.read_bytes(),
        "garbage": is_garbage(answer[0])[0] if isinstance(answer, list) else None,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with totals and the names of those that were missed."""
    lines = ["| fault | verdict | layer | named | repaired bit for bit | s |", "|---|---|---|---|---|---|"]
    for r in rows:
        marks = ["yes" if r[key] else "no" for key in ("layer", "named", "bits")]
        lines.append(f"| `{r['fault']}` | {r['verdict']} | {' | '.join(marks)} | {r['seconds']:.1f} |")
    lines.append("")
    for key, words in (("layer", "right layer"), ("named", "named"), ("bits", "repaired bit for bit")):
        missed = ", ".join(f"`{r['fault']}`" for r in rows if not r[key])
        lines.append(f"* {words}: {sum(bool(r[key]) for r in rows)} of {len(rows)}; not: {missed or 'none'}")
    wrong = [r["fault"] for r in rows if r["written"] and not r["bits"]]
    lines.append(f"* written, and other bytes than the healthy file: {', '.join(f'`{id}`' for id in wrong) or 'none'}")
    quiet = [r["fault"] for r in rows if r["verdict"] in ("same", "healthy", "equivalent")]
    lines.append(f"* verdict healthy: {', '.join(f'`{id}`' for id in quiet) or 'none'}")
    return "\n".join(lines)


# ── pairs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def pairs() -> Iterator[tuple[str, str]]:
    """Pairs of file faults, spread over the catalogue, always in the same order."""
    ids = list(file_faults())
    for stride in (7, 19, 31, 43):
        for n in range(0, len(ids), 5):
            yield ids[n], ids[(n + stride) % len(ids)]


def pair_table(folder: Path) -> str:
    """A sample of pairs: in both layers, both named, with the totals."""
    lines = ["| pair | verdict | layers | named | s |", "|---|---|---|---|---|"]
    both = dict.fromkeys(("layers", "names"), 0)
    count = 0
    for pair in pairs():
        made = broken_file(pair, folder) if count < PAIRS else None
        if made is None:
            continue
        count += 1
        started = time.perf_counter()
        verdict = peel(None, made[0], threads=1)
        found = found_by(verdict, pair)
        for key, holds in found.items():
            both[key] += all(holds)
        marks = [f"{sum(found[key])} of 2" for key in ("layers", "names")]
        seconds = time.perf_counter() - started
        lines.append(f"| `{pair[0]}`, `{pair[1]}` | {verdict.verdict} | {' | '.join(marks)} | {seconds:.1f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join([*lines, "", f"* both layers: {both['layers']} of {count}; both named: {both['names']} of {count}"])


# ── healthy files ─────────────────────────────────────────────────────────────────────────────────────────────────


def noisy(model: Model, share: float) -> Model:
    """A fine-tune, as it were: noise on every matrix, its size a share of the matrix's own; encoded as before."""
    rng = np.random.default_rng(15)
    tensors = {}
    for name, tensor in model.tensors.items():
        if len(tensor.shape) == 2:
            values = tensor.dequantise()
            values = values + rng.normal(0, share * float(values.std()), values.shape).astype(np.float32)
            tensor = tensor.replace(content=quantise(values, tensor.type).reshape(-1))
        tensors[name] = tensor
    return model.with_changes(tensors=tensors)


def with_more_tokens(folder: Path, more: int = 24) -> Path:
    """The embedded model with padding behind its vocabulary: tokens nobody uses, rows of zeros."""
    from variants import variant

    model = open_model(REF)
    data = model.tokenizer
    keys = {
        "tokenizer.ggml.tokens": [*data.tokens, *(f"[PAD{n}]" for n in range(more))],
        "tokenizer.ggml.token_type": [*data.token_types, *[5] * more],
    }
    tensors = {}
    for name in ("token_embd.weight", "output.weight"):
        tensor = model.tensors[name]
        raw = np.concatenate([tensor.raw, np.zeros(more * tensor.type.row_bytes(tensor.cols), np.uint8)])
        tensors[name] = tensor.replace(shape=(tensor.rows + more, tensor.cols), content=raw)
    return variant(REF, folder / "tokens.gguf", keys=keys, tensors=tensors)


def variants(folder: Path) -> Iterator[tuple[str, Path | Model]]:
    """Healthy files by name."""
    sys.path[:0] = ["tests", "tests/laws"]
    from generator import healthy

    for n, case in enumerate(healthy(REF)):
        if (path := case.make(folder / f"v{n}.gguf")) is not None:
            yield case.name, path
    for kind in ("q4_0", "q3_k", "q2_k", "aprq4"):
        path = folder / f"{kind}.apr"
        convert(REF, path, quantize=kind)
        yield f"re-encoded {kind}", path
    yield "another vocabulary size", with_more_tokens(folder)
    for share in (0.001, 0.005, 0.01):
        yield f"noise of {share:g} on all weights", noisy(open_model(REF), share)


def real_variants(folder: Path) -> Iterator[tuple[str, Path]]:
    """The real 0.5B as published and in other types."""
    yield "0.5B as published", REAL
    for kind in ("q8_0", "q4_0", "q6_k", "q5_k", "q3_k", "q2_k"):
        path = folder / "real.apr"
        try:
            convert(REAL, path, quantize=kind, force=True)
        except AprlabError as error:
            print(f"0.5B as {kind}: {error}", file=sys.stderr)
            continue
        yield f"0.5B re-encoded {kind}", path


def false_alarms(files: Iterator[tuple[str, Path | Model]]) -> str:
    """Verdicts on healthy files; all but healthy are false alarms."""
    alarms, count = [], 0
    for name, file in files:
        started = time.perf_counter()
        verdict = peel(None, file)
        count += 1
        talk = verdict.health.get("conversation", {}).get("nats")
        text = verdict.health.get("text", {}).get("nats")
        seconds = time.perf_counter() - started
        print(f"| {name} | {verdict.verdict} | {talk} | {text} | {seconds:.1f} |", file=sys.stderr, flush=True)
        if verdict.exit_code:
            alarms.append(f"{name} ({verdict.verdict}: {', '.join(f.code for f in verdict.findings if not f.harmless)})")
    return f"{len(alarms)} false alarms over {count} healthy files: {', '.join(alarms) or 'none'}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, asked = Path(name), set(sys.argv[1:])
        if "--pairs" in asked:
            print(pair_table(folder))
        if "--healthy" in asked:
            print(false_alarms(real_variants(folder) if "--real" in asked else variants(folder)))
        if asked & {"--pairs", "--healthy"}:
            return
        source = REAL if "--real" in asked else REF
        ids = [id for id in file_faults() if id in asked] or (REAL_FAULTS if source == REAL else file_faults())
        rows = []
        for id in ids:
            if (made := row(id, folder, source, repaired="--peel" not in asked)) is not None:
                print(made, file=sys.stderr, flush=True)
                rows.append(made)
    print(table(rows))


if __name__ == "__main__":
    main()
