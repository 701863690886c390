"""Measure the marks of healthy files: the column `measured` of `data/block-marks.toml` and `data/order-marks.toml`.

``python docs/make/block_marks.py [MORE.gguf ...]`` measures the embedded model as published and encoded anew by this project in
every type, the same by ggml's own encoder where gguf-py is installed, the real 0.5B where it was fetched, and what else is named.
"""

from __future__ import annotations

import json
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from aprlab import paths
from aprlab.conversion.converter import convert
from aprlab.formats import open_model
from aprlab.onion.block_marks import marks_of
from aprlab.onion.order_marks import order_marks

OWN = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q5_0", "q5_1", "q4_0", "q4_1", "aprq4")
BLOCK_TABLE, ORDER_TABLE = paths.data_dir() / "block-marks.toml", paths.data_dir() / "order-marks.toml"


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


def noted(row: dict[str, list[float]], key: str, value: float) -> None:
    """Widen what was measured of `key` by a value."""
    pair = row.setdefault(key, [value, value])
    pair[:] = [min(pair[0], value), max(pair[1], value)]


def written(table: Path, origins: list[str], rows: dict[str, str]) -> None:
    """The table again, with other origins and measured values; the limits stay."""
    text = table.read_text(encoding="utf-8")
    lines = [f'origin = "{"; ".join(dict.fromkeys(origins))}"', ""]
    for mark, row in tomllib.loads(text)["marks"].items():
        kept = [f"{key} = {json.dumps(value)}" for key, value in row.items() if key != "measured"]
        lines += [f"[marks.{mark}]", *kept, f"measured = {rows.get(mark, '{}')}", ""]
    table.write_text(text[: text.index("origin =")] + "\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    blocks: dict[str, dict[str, list[float]]] = {}
    orders: dict[str, list[float]] = {}
    origins = []
    with tempfile.TemporaryDirectory() as name:
        for title, path in files(Path(name)):
            origins.append(title)
            tensors = open_model(path).tensors
            found = marks_of(tensors.values())
            for mark in found:
                noted(blocks.setdefault(mark.name, {}), mark.type.name, mark.value)
            odd: list[object] = [mark for mark in found if not mark.likely]
            for order in order_marks(tensors):
                noted(orders, order.name, order.value)
                odd += [] if order.likely else [order]
            for mark_ in odd:
                print(f"outside: {title}: {mark_}", file=sys.stderr)
    by_type = {
        mark: "{ " + ", ".join(f"{kind} = [{low:.4g}, {high:.4g}]" for kind, (low, high) in sorted(row.items())) + " }"
        for mark, row in blocks.items()
    }
    written(BLOCK_TABLE, origins, by_type)
    written(ORDER_TABLE, origins, {mark: f"[{low:.3g}, {high:.3g}]" for mark, (low, high) in orders.items()})


if __name__ == "__main__":
    main()
