"""Print the table of what a mat-vec costs, for `docs/kernels.md`: `python docs/make/kernel_costs.py [GPU.json]`.

GPU.json is a record of `benchmarks/bench_gpu.py`; it fills the last column.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aprlab.engines.ptx import PtxDevice
from aprlab.kernels.cuda.cost_model import COLS, GPUS, bytes_a_weight, costs
from aprlab.kernels.cuda.device import Device


def measured(path: str) -> dict[tuple[str, str], float]:
    """Seconds of 1536 x 8960 by type and contract, as a GPU took them; never those of a rehearsal."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    assert not record["rehearsal"], f"{path} is a rehearsal"
    return {(r["type"], r["contract"]): r["seconds"] for r in record["matvecs"] if (r["rows"], r["cols"]) == (1536, COLS)}


def table(device: Device, seconds: dict[tuple[str, str], float]) -> str:
    """The table, as Markdown. The last column is for what a GPU measured: `seconds`."""
    heads = " | ".join(f"{gpu.name}: allowed | share | predicted µs" for gpu in GPUS)
    lines = [
        f"| type | contract | bytes a weight | thread instr. a weight | issued a weight | {heads} | measured µs |",
        "|---|---|" + "---:|" * (4 + 3 * len(GPUS)),
    ]
    for cost in costs(device):
        cells = [cost.kind.name, cost.contract, f"{bytes_a_weight(cost.kind):.4f}"]
        cells += [f"{cost.thread_instructions:.2f}", f"{cost.warp_instructions:.2f}"]
        for gpu in GPUS:
            share = cost.warp_instructions / gpu.allowed(cost.kind)
            cells += [f"{gpu.allowed(cost.kind):.1f}", f"{100 * share:.0f} %", f"{1e6 * cost.predicted(gpu, 1536, COLS):.1f}"]
        at = seconds.get((cost.kind.name, cost.contract))
        lines.append("| " + " | ".join([*cells, "" if at is None else f"{1e6 * at:.1f} "]) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(PtxDevice(), measured(sys.argv[1]) if len(sys.argv) > 1 else {}))
