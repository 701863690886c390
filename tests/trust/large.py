"""Large files through the verbs: many layers, many tensors. Time must grow as the file does, or stop at a stated limit.

    python tests/trust/large.py                                  # the table of docs/trust.md (many minutes)
    python tests/trust/large.py --layers 200,1000 --verbs peel/check
    python tests/trust/large.py --tensors 25000 --verbs inspect
    python tests/trust/large.py --make FOLDER                    # only the files

A model of N layers is 32 wide, Q8_0, of random numbers: sound, and its answers are garbage. A file of N tensors has tensors of
one value under names that no model has. Measured as in `every_verb.py`: seconds of the processor, and the peak of memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import every_verb  # noqa: E402
import hostile  # noqa: E402
import numpy as np  # noqa: E402
from made import bpe_data, write_gguf  # noqa: E402

from aprlab.conversion.converter import convert  # noqa: E402
from aprlab.model.config import ModelConfig  # noqa: E402
from aprlab.model.inventory import shapes  # noqa: E402
from aprlab.model.model import Model  # noqa: E402
from aprlab.model.tensor import Origin, Tensor  # noqa: E402
from aprlab.quants import quantise, types  # noqa: E402

CONFIG = ModelConfig(
    architecture="qwen2", block_count=1, embedding_length=32, feed_forward_length=64, head_count=2, head_count_kv=1, head_dim=16,
    vocab_size=0, context_length=256, rope_theta=10_000.0, rope_type="neox", rms_norm_eps=1e-5, tied_embeddings=True,
)  # fmt: skip
LAYERS, TENSORS = (200, 1000, 4000), (25_000, 100_000)
VERBS = ("inspect", "fingerprint", "diff", "check", "run", "peel", "convert", "gates")
# FILE against the APR file that is made of it, and against one whose last matrix is lost
PAIRS = {
    "diff, the same": ["diff", "FILE", "TWIN"],
    "gates, the same": ["gates", "FILE", "TWIN", "-n", "2"],
    "peel, the same": ["peel", "FILE", "TWIN"],
    "peel, one lost": ["peel", "FILE", "LOST"],
}


def layers(count: int) -> Callable[[Path], Path]:
    """A model of so many layers of random numbers."""

    def make(path: Path) -> Path:
        data = bpe_data("qwen2")
        config = replace(CONFIG, block_count=count, vocab_size=len(data.tokens))
        random = np.random.default_rng(count)
        tensors = {}
        for name, shape in shapes(config).items():
            values = random.standard_normal(shape, np.float32)
            kind = types.Q8_0 if len(shape) == 2 else types.F32
            raw = quantise(values, kind).reshape(-1) if len(shape) == 2 else values.view(np.uint8)
            tensors[name] = Tensor(name, kind, shape, raw, Origin(path, name, 0))
        model = Model(path, "gguf", "in memory", tensors, {}, lambda: config, lambda: data)
        return write_gguf(model, path)

    return make


def tensors(count: int) -> Callable[[Path], Path]:
    """A sound model of one layer, and so many tensors of one value each."""

    def make(path: Path) -> Path:
        model = hostile._model()
        one = np.ones(1, np.float32).view(np.uint8)
        more = {f"t{n}": Tensor(f"t{n}", types.F32, (1,), one, Origin(path, f"t{n}", 0)) for n in range(count)}
        return write_gguf(replace(model, tensors={**model.tensors, **more}), path)

    return make


def twins(file: Path) -> dict[str, str]:
    """The APR file made of a model, and a copy of that with zeros for the end of its data."""
    twin, lost = file.with_suffix(".apr"), file.with_suffix(".lost.apr")
    convert(file, twin, force=True)
    data = bytearray(twin.read_bytes())
    data[-512:] = bytes(512)
    lost.write_bytes(data)
    return {"TWIN": str(twin), "LOST": str(lost)}


def files(layer_counts: list[int], tensor_counts: list[int]) -> dict[str, Callable[[Path], Path]]:
    """By name of the file."""
    made = {f"{n}-layers.gguf": layers(n) for n in layer_counts}
    return made | {f"{n}-tensors.gguf": tensors(n) for n in tensor_counts}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default=None, help="Counts, with commas.")
    parser.add_argument("--tensors", default=None, help="Counts, with commas.")
    parser.add_argument("--verbs", default="", help="Those of `every_verb.py`, and pairs; with strokes: peel/check.")
    parser.add_argument("--make", type=Path, help="A folder for the files; no verb is run.")
    options = parser.parse_args()
    default = options.layers is None and options.tensors is None
    counts = [list(given) if default else [int(n) for n in (text or "").split(",") if n]
              for given, text in ((LAYERS, options.layers), (TENSORS, options.tensors))]  # fmt: skip
    every_verb.MOST = 600
    with tempfile.TemporaryDirectory() as place:
        for name, make in files(*counts).items():
            file = make((options.make or Path(place)) / name)
            print(f"{name}: {file.stat().st_size:,} bytes", flush=True)
            have = {**every_verb.MODEL_VERBS, **(PAIRS if "layers" in name else {})}
            chosen = options.verbs.split("/") if options.verbs else [*VERBS, *PAIRS]
            others = twins(file) if "layers" in name and set(chosen) & set(PAIRS) else {}
            for verb in chosen if options.make is None else ():
                if verb in have:
                    s = every_verb.look(file, verb, [others.get(word, word) for word in have[verb]])
                    wrong = "; ".join(w for w in s.wrong if not w.endswith((" s", " MB")))
                    print(f"| {name} | {verb} | {s.status} | {s.seconds} | {s.megabytes} | {s.said[:90]} | {wrong}", flush=True)
            if options.make is None:
                for path in (file, *map(Path, others.values())):
                    path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
