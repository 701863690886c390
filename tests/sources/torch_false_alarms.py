"""Healthy runs of transformers that must not be called faulty: `python tests/sources/torch_false_alarms.py [MODEL.gguf]`.

The published Qwen2.5-Coder 0.5B where no model is named, exported to a folder in F16; f32, bf16 and f16, eager and sdpa, three
prompts. Needs the extra `torch`. One line for each; the exit status is 1 if any of them is an alarm.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from false_alarms import MODEL, PROMPTS  # noqa: E402

import aprlab  # noqa: E402
from aprlab.conversion.converter import export  # noqa: E402
from aprlab.onion.source_peeling import tokens_for  # noqa: E402


def main(path: Path) -> int:
    alarms = count = 0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "f16"
        export(path, folder, format="safetensors", dtype="f16")
        model = aprlab.open_model(folder)
        tokens = [tokens_for(model, prompt, None) for prompt in PROMPTS]
        for dtype in ("f32", "bf16", "f16"):
            for attention in ("eager", "sdpa"):
                with aprlab.source(f"transformers,folder={folder},dtype={dtype},attention={attention}", model) as theirs:
                    for ids, asked in tokens:
                        started = time.process_time()
                        found = aprlab.peel(model, sources=[theirs], prompt=ids[:asked])
                        bad = [f.code for f in found.findings if not f.harmless]
                        count, alarms = count + 1, alarms + bool(bad)
                        took = time.process_time() - started
                        print(f"{dtype:5} {attention:6} {len(ids):3} tokens {found.verdict:11} {took:6.1f} s {bad}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count} healthy runs, {alarms} alarms; peak {peak:.1f} GiB")
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL))
