"""Healthy runs of llama.cpp that must not be called faulty: `python tests/sources/false_alarms.py [MODEL.gguf] [TYPE …]`.

A model (the published Qwen2.5-Coder 0.5B where none is named) as it is, and re-encoded to each TYPE; a cache of F16 and of
F32, with and without flash attention; three prompts. One line for each; the exit status is 1 if any of them is an alarm.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import aprlab  # noqa: E402
from aprlab import paths  # noqa: E402
from aprlab.conversion import convert  # noqa: E402

MODEL = paths.models_dir() / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
TYPES = ("q8_0", "f16", "f32")
CACHES = ("cache=f16,flash=off", "cache=f16,flash=on", "cache=f32,flash=off", "cache=f32,flash=on")
PROMPTS = ("What is 2+2?", "Write a Python function that adds two numbers.", "日本の首都はどこですか。")


def main(model: Path, types: list[str]) -> int:
    os.environ["PYTHONPATH"] = str(HERE.parents[1])
    alarms = count = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in ["as published", *types]:
            path = model
            if kind != "as published":
                path = Path(folder) / "m.gguf"
                convert(model, path, quantize=kind, force=True)
            for cache in CACHES:
                for prompt in PROMPTS:
                    started = time.perf_counter(), time.process_time()
                    found = aprlab.peel(path, sources=[f"llama.cpp,{cache}"], prompt=prompt)
                    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
                    bad = [f.code for f in found.findings if not f.harmless]
                    count, alarms = count + 1, alarms + bool(bad)
                    said = f"{found.verdict:10} {wall:6.1f} s, {cpu:6.1f} of this processor {bad}"
                    print(f"{kind:13} {cache:20} {prompt[:20]:22} {said}", flush=True)
    print(f"{count} healthy runs, {alarms} alarms")
    return int(alarms > 0)


if __name__ == "__main__":
    given = [Path(a) for a in sys.argv[1:2] if a.endswith(".gguf")]
    sys.exit(main(given[0] if given else MODEL, sys.argv[1 + len(given) :] or list(TYPES)))
