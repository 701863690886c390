"""llama-server made faulty by edited files, judged by its answers alone: `python tests/sources/server_evidence.py [ID …]`.

The server is the one in the wheel `xllamacpp` (extra `peer`); it listens on the loopback. The judge has the healthy file.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from foreign_evidence import FILES, named  # sets the path, too
from variants import variant

from aprlab.formats import open_model
from aprlab.onion.source_peeling import peel_sources
from aprlab.paths import embedded_model

_MORE = {  # what they are called where a run is judged and no operation
    "file theta 5e5": ("rope_theta",), "file theta 8e6": ("rope_theta",), "file eps 1e-5": ("rms_norm_eps",),
    "file eps 1e-3": ("rms_norm_eps",), "file gate and up exchanged": ("swapped-gate-up",),
}  # fmt: skip
PROMPTS = ("What is 2+2?", "Write a Python function that reverses a string.", "Who are you?")


def serving(path: Path) -> Any:
    """llama-server over a file, as it is by default: a cache in half precision, flash attention where it has it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 512, 1, 0, False, -1
    return xllamacpp.Server(params)


def main(only: list[str]) -> None:
    model = open_model(embedded_model())
    healthy = serving(embedded_model())
    for prompt in PROMPTS:
        verdict = peel_sources(model, [healthy.listening_address], prompt=prompt)
        print(f"healthy {prompt!r}: {verdict.verdict} {[f.code for f in verdict.findings]}", flush=True)
    del healthy
    found = called = count = 0
    for case in FILES:
        if only and case.id not in only:
            continue
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            tensors = case.tensors(model) if case.tensors is not None else None
            edited = variant(embedded_model(), Path(folder) / "edited.gguf", keys=case.keys, tensors=tensors)
            server = serving(edited)
            verdict = peel_sources(replace(model), [server.listening_address], prompt=PROMPTS[0])
            del server
        right = {*case.names, *_MORE.get(case.id, ())}
        hit = bool((named(verdict) - {""}) & right)
        count, found, called = count + 1, found + (verdict.verdict == "broken"), called + hit
        what = [f.fault or f.code for f in verdict.findings]
        print(f"{case.id:32} {verdict.verdict} {what} {'named' if hit else ''} {time.process_time() - started:.0f} s", flush=True)
    print(f"{count} faults: found {found}, named {called}")


if __name__ == "__main__":
    main(sys.argv[1:])
