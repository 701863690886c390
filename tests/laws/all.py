"""All files of the generator under all laws: `python tests/laws/all.py [PART OF A NAME]`; exit status 1 for a violation."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main(part: str = "") -> int:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from generator import cases
    from laws import ask

    from aprlab import paths

    source = paths.embedded_model()
    asked = broken = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(source):
            if part not in case.name:
                continue
            said = ask(case, source, Path(folder))
            if said is None:
                continue
            asked += 1
            broken += bool(said.broken)
            for law in said.broken:
                print(f"{case.name}: {law}", flush=True)
            if asked % 50 == 0:
                print(f"… {asked} files", file=sys.stderr, flush=True)
    print(f"{asked} files, {broken} of them break a law")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
