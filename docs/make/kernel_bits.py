"""Write what every kernel case gives on the PTX machine, for a GPU to be compared with: `python docs/make/kernel_bits.py`."""

from __future__ import annotations

import json
from pathlib import Path

from aprlab.engines.ptx import PtxDevice
from aprlab.formats.writing import write_text
from aprlab.kernels.cuda import verify

OUTPUT = Path(verify.__file__).parent / "ptx" / "bits.json"


def bits() -> dict[str, dict[str, str]]:
    """By name of the case; every case has to pass."""
    found = {}
    for case in verify.cases():
        bench = verify.Bench(PtxDevice())
        assert case.run(bench).passed, case.name
        found[case.name] = bench.bits()
    return found


if __name__ == "__main__":
    write_text(OUTPUT, json.dumps(bits(), indent=1) + "\n")
