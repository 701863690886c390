"""The kernels that ship as LLVM modules: `python docs/make/kernel_modules.py [--check]`, about four minutes of processor time.

Run it again whenever a file of `aprlab/kernels/simd` has changed, or numba's release; until then kernels are compiled on the
user's machine, as they were before modules were shipped. `--check` writes nothing and exits with 1 where a module differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from aprlab.kernels.simd import emission, shipped

MAKE = """
import sys
from pathlib import Path
from aprlab.kernels.simd import emission, isa, shipped
shipped.FOLDER = Path(sys.argv[2])
chosen = isa.choose(sys.argv[1])
shipped.write(chosen, emission.emit(chosen))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is shipped")
    check = parser.parse_args().check
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        for isa in shipped.SHIPPED:
            environment = os.environ | emission.environment(isa)
            subprocess.run([sys.executable, "-c", MAKE, isa.name, folder], env=environment, check=True)
            made, there = Path(folder) / shipped.path(isa).name, shipped.path(isa)
            if check:
                same = there.exists() and there.read_bytes() == made.read_bytes()
                differ = differ or not same
                print(f"{there.name}: {'as shipped' if same else 'differs from what is shipped'}")
            else:
                shipped.FOLDER.mkdir(exist_ok=True)
                there.write_bytes(made.read_bytes())
                print(f"{there.name}: {len(shipped.read(isa).modules)} modules, {there.stat().st_size:,} bytes")
    sys.exit(int(differ))


if __name__ == "__main__":
    main()
