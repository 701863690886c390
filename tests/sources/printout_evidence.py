"""Printouts of llama.cpp on edited files: `python tests/sources/printout_evidence.py [ID …]` prints a line for each.

llama.cpp itself computes with another base, epsilon, bias, norm, weight or row order (`foreign_evidence.FILES`); what it prints,
in the layout of llama-eval-callback, is compared with the healthy embedded model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from foreign_evidence import FILES, PROMPT, named, variant

from aprlab.formats import open_model
from aprlab.onion import source_peeling
from aprlab.paths import embedded_model


def main(only: list[str]) -> None:
    model, script = open_model(embedded_model()), Path(__file__).with_name("eval_printer.py")
    count = right = called = 0
    with tempfile.TemporaryDirectory() as root:
        for case in FILES:
            if only and case.id not in only:
                continue
            tensors = case.tensors(model) if case.tensors is not None else None
            edited = variant(embedded_model(), Path(root) / "e.gguf", keys=case.keys, tensors=tensors)
            text = Path(root) / "e.txt"
            text.write_text(subprocess.run([sys.executable, script, edited, PROMPT], capture_output=True, text=True).stdout)
            started = time.process_time()
            verdict = source_peeling.peel_sources(model, [str(text)], prompt=PROMPT)
            first = (verdict.first_divergence or {}).get("point", "nowhere")
            step, name = first.split(".")[-1] == case.step, bool(named(verdict) & set(case.names))
            count, right, called = count + 1, right + step, called + name
            what = [f.fault or f.parameters.get("form") or f.code for f in verdict.findings]
            said = f"step {'ok' if step else f'{first} INSTEAD OF {case.step}'} name {'ok' if name else 'OTHER'} {what}"
            print(f"{case.id:32} {verdict.verdict:10} {said} {time.process_time() - started:.1f} s", flush=True)
    print(f"{count} printouts: step right {right}, named {called}")


if __name__ == "__main__":
    main(sys.argv[1:])
