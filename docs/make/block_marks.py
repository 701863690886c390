"""Measure the marks of healthy blocks: the column `measured` of `data/block-marks.toml`.

``python docs/make/block_marks.py [MORE.gguf ...]`` measures the embedded model as published and encoded anew by this project in
every type, the same by ggml's own encoder where gguf-py is installed, the real 0.5B where it was fetched, and what else is named.
"""

from __future__ import annotations

import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from aprlab import paths
from aprlab.conversion.converter import convert
from aprlab.formats import open_model
from aprlab.onion.block_marks import marks_of

OWN = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q5_0", "q5_1", "q4_0", "q4_1", "aprq4")
TABLE = paths.data_dir() / "block-marks.toml"


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Healthy files by what they are."""
    yield "the embedded model", paths.embedded_model()
    real = paths.models_dir() / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    if real.is_file():
        yield "Qwen2.5-Coder-0.5B as published (ggml's encoder)", real
    for kind in OWN:
        path = folder / f"{kind}.apr"
        convert(paths.embedded_model(), path, quantize=kind)
        yield "the embedded model in each type by this project's encoder", path
    for name in sys.argv[1:]:
        yield Path(name).name, Path(name)


def main() -> None:
    measured: dict[str, dict[str, list[float]]] = {}
    origins = []
    with tempfile.TemporaryDirectory() as name:
        for title, path in files(Path(name)):
            origins.append(title)
            for mark in marks_of(open_model(path).tensors.values()):
                pair = measured.setdefault(mark.name, {}).setdefault(mark.type.name, [mark.value, mark.value])
                pair[:] = [min(pair[0], mark.value), max(pair[1], mark.value)]
                if not mark.likely:
                    print(f"outside: {title}: {mark}", file=sys.stderr)
    text = TABLE.read_text(encoding="utf-8")
    head = text[: text.index("origin =")]
    lines = [f'origin = "{"; ".join(dict.fromkeys(origins))}"', ""]
    for mark, row in tomllib.loads(text)["marks"].items():
        kinds = ", ".join(f"{kind} = [{low:.4g}, {high:.4g}]" for kind, (low, high) in sorted(measured.get(mark, {}).items()))
        lines += [f"[marks.{mark}]", f"healthy = {row['healthy']}", f"measured = {{ {kinds} }}", ""]
    TABLE.write_text(head + "\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
