"""Record the traces of transformers that the tests judge where torch is not installed: `python docs/make/transformers_record.py`.

Needs the extra `torch`. The model is the first layer of the embedded one, which transformers' own GGUF loader decodes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "sources")]

from torch_faults import theta  # noqa: E402
from variants import shallow  # noqa: E402

from aprlab import paths  # noqa: E402
from aprlab.formats import open_model  # noqa: E402
from aprlab.sources import source  # noqa: E402
from aprlab.sources.torch_hooks import loaded  # noqa: E402

TOKENS, PROMPT = [5, 9, 30], 2
DATA = ROOT / "tests" / "data"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(shallow(paths.embedded_model(), Path(folder) / "one-layer.gguf"))
        attention = "layers.0.?,layers.0.?_rope,layers.0.attn"
        for name, options, points in (("bf16", "", "*"), ("bf16-sdpa", ",attention=sdpa", attention)):
            with source(f"transformers,dtype=bf16{options}", model) as healthy:
                healthy.run(TOKENS, points, prompt=PROMPT).save(DATA / f"transformers-{name}.npz", force=True)
        faulty = loaded(model)
        theta(1e4)(faulty.live)
        faulty.run(TOKENS, "layers.0.?,layers.0.?_rope", prompt=PROMPT).save(DATA / "transformers-theta.npz", force=True)
    for file in sorted(DATA.glob("transformers-*.npz")):
        print(file.name, file.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
