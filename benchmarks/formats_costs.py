"""What each way between GGUF, APR and SafeTensors does to the values and to the answers of a model.

    python benchmarks/formats_costs.py model.gguf [--golden tests/data/golden-0.5b.json] [--only f32 q8_0 …]

Every row is a conversion that is really made, from the file that the row before it or the GGUF is, and run on the engine
jit: tokens are compared with the source's (or with a golden file's), never text. Prints the table of docs/formats.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.conversion.converter import convert, export
from aprlab.conversion.report import ConversionReport
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.published import QUESTION

PROMPTS = [("chat", QUESTION), ("chat", "Explain quicksort in one sentence."), ("raw", "def add(a, b):\n")]


def answers(path: Path, prompts: list[list[int]], limit: int) -> list[list[int]]:
    with open_model(path) as model:
        session = Session(model, engine="jit", threads=1)
        return [session.generate(ids, max_tokens=limit).tokens for ids in prompts]


def ids_of(path: Path) -> list[list[int]]:
    with open_model(path) as model:
        session = Session(model, engine="jit", threads=1)
        return [session.prompt_tokens(text, raw=mode == "raw") for mode, text in PROMPTS]


def cost(report: ConversionReport) -> str:
    changed = [c for c in report.costs if c.error]
    if not changed:
        return "none: every value is the same"
    square, error = (sum(getattr(c, key) for c in report.costs) for key in ("square", "error"))
    return f"{np.sqrt(error / square):.2g} of the values' rms, at most {max(c.worst for c in changed):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--golden", type=Path, help="prompts and ids that the F32 reference gives")
    parser.add_argument("--only", nargs="*", default=["apr", "f32", "f16", "bf16", "q8_0", "q4_k_m"])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    if options.golden:
        runs: list[dict[str, Any]] = json.loads(options.golden.read_text())["runs"]
        limit, prompts, due = 64, [r["prompt_ids"] for r in runs], [r["output_ids"] for r in runs]
    else:
        limit, prompts = 48, ids_of(options.model)
        due = answers(options.model, prompts, limit)
    columns = ("from", "to", "seconds of processor", "bytes", "what it does to the weights", "tokens")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)

    def row(label: str, action: Any, path: Path) -> None:
        started = time.process_time()
        report = action()
        seconds = time.process_time() - started
        got = answers(path, prompts, limit)
        same = sum(a == b for a, b in zip(got, due, strict=True))
        first = sum(a[:8] == b[:8] for a, b in zip(got, due, strict=True))
        print(f"| {label} | {seconds:.1f} | {report.bytes_out} | {cost(report)} | {same} of {len(due)} answers the same to the "
              f"last token, {first} in the first 8 |", flush=True)  # fmt: skip

    with tempfile.TemporaryDirectory(dir=options.dir) as made:
        folder = Path(made)
        whole = folder / "f32"
        if "apr" in options.only:
            row("GGUF | APR", lambda: convert(options.model, folder / "m.apr"), folder / "m.apr")
            row("APR | GGUF", lambda: export(folder / "m.apr", folder / "back.gguf"), folder / "back.gguf")
            (folder / "back.gguf").unlink()
        if "f32" in options.only:
            row("GGUF | SafeTensors F32", lambda: export(options.model, whole, format="safetensors"), whole)
        for dtype in ("f16", "bf16"):
            if dtype in options.only:
                out = folder / dtype
                source, label = (options.model, "GGUF") if "apr" not in options.only else (folder / "m.apr", "APR")
                row(f"{label} | SafeTensors {dtype.upper()}",
                    lambda s=source, o=out, d=dtype: export(s, o, format="safetensors", dtype=d), out)  # fmt: skip
        for kind, suffix in (("q8_0", "apr"), ("q4_k_m", "gguf")):
            if kind in options.only:
                out, label = folder / f"{kind}.{suffix}", f"SafeTensors F32 | {suffix.upper()} {kind.upper()}"
                row(label, lambda o=out, k=kind: convert(whole, o, quantize=k), out)


if __name__ == "__main__":
    main()
