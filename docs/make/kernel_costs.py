"""Print the table of what a mat-vec costs, for `docs/kernels.md`: `python docs/make/kernel_costs.py`."""

from __future__ import annotations

from aprlab.engines.ptx import PtxDevice
from aprlab.kernels.cuda.cost_model import COLS, GPUS, bytes_a_weight, costs
from aprlab.kernels.cuda.device import Device


def table(device: Device) -> str:
    """The table, as Markdown. The last column is for what a GPU measured."""
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
        lines.append("| " + " | ".join([*cells, ""]) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(PtxDevice()))
