"""Coverage-guided fuzzing of the readers with atheris (extra `fuzz`).

    python tests/fuzz/fuzz.py gguf --seconds 300      # one target; what it finds is written beside, and printed
    python tests/fuzz/fuzz.py seeds                   # makes the first files of the corpus anew
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"


def instrument() -> None:
    """Import the targets, what they call told of every branch that is taken: seconds, once in a process."""
    import atheris

    packages = ["aprlab.formats", "aprlab.kernels.ptx", "aprlab.qualification", "aprlab.formats.yaml_files", "aprlab.model"]
    with atheris.instrument_imports(include=packages):
        import targets  # noqa: F401


def fuzz(name: str, seconds: int, seed: int, found: Path, corpus: Path, runs: int = -1) -> None:
    """Fuzz one target for so long, or so many runs; the process ends with libFuzzer's status, 0 when nothing was found."""
    import resource

    import atheris

    # libFuzzer looks at getrusage, which a child has from its parent; so the kernel is asked to hold the bound.
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    instrument()
    from targets import CORPUS_OF, run

    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-runs={runs}", f"-seed={seed}", "-max_len=60000"]
    options += ["-timeout=20", "-rss_limit_mb=0", f"-artifact_prefix={found}/", "-print_final_stats=1", "-verbosity=1"]
    options += [str(corpus), str(CORPUS / CORPUS_OF.get(name, name))]
    atheris.Setup([sys.argv[0], *options], lambda data: run(name, data) and None)
    atheris.Fuzz()


def seeds() -> None:
    """One sound file of each kind, as small as it can be."""
    sys.path.insert(0, str(HERE.parent))
    import builders

    from aprlab.conversion.converter import convert, export
    from aprlab.quants import types
    from aprlab.tracing.traces import trace

    config = dataclasses.replace(
        builders.CONFIG, block_count=1, embedding_length=32, feed_forward_length=64, head_count=2, head_count_kv=1, head_dim=16,
        vocab_size=290,
    )  # fmt: skip
    model = builders.random_model(5, config, (types.Q4_0, types.Q5_1, types.Q8_0, types.Q5_0, types.F16))
    model.format, model.path = "apr", Path(__file__)  # an export wants a file, and reports its size
    for name in ("gguf", "apr", "safetensors", "yaml", "ptx", "npz"):
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
    export(model, CORPUS / "gguf/sound.gguf", force=True)
    convert(CORPUS / "gguf/sound.gguf", CORPUS / "apr/sound.apr", force=True)
    convert(CORPUS / "gguf/sound.gguf", CORPUS / "apr/realizar.apr", dialect="realizar", force=True)
    convert(CORPUS / "gguf/sound.gguf", CORPUS / "apr/zstd.apr", compress="zstd", force=True)
    trace(builders.random_model(5, config), [1, 2, 3], "layers.0.*,logits").save(CORPUS / "npz/sound.npz", force=True)
    header = b'{"__metadata__":{"format":"pt"},"a.b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    (CORPUS / "safetensors/sound.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(12)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=["gguf", "apr", "safetensors", "yaml", "ptx", "npz", "raw-gguf", "raw-apr", "seeds"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=HERE / "found", help="Where bytes that break a target are written.")
    parser.add_argument("--corpus", type=Path, default=HERE / "grown", help="Where inputs that reach new code are kept.")
    options = parser.parse_args()
    if options.target == "seeds":
        seeds()
    else:
        fuzz(options.target, options.seconds, options.seed, options.found / options.target, options.corpus / options.target)


if __name__ == "__main__":
    main()
