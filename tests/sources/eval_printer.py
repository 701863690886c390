"""What `llama-eval-callback` prints, printed from the wheel's callback: `python tests/sources/eval_printer.py MODEL.gguf PROMPT`.

The example's program is in no wheel. Its layout is this: a line for each node of the graph, the first and last three of each
axis, four digits, and the sum in float32 (llama.cpp, common/debug.cpp). As the example does, logits are asked of the last token.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from aprlab.sources import llama_api  # noqa: E402

SHOWN = 3
TYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64}
NE, NB, SOURCES = 16, 48, 152  # in ggml_tensor


def printed(name: str, kind: str, operation: str, sources: list[str], values: np.ndarray, function: str) -> str:
    """One node; `values` with four axes, the slowest first."""

    def sides(shape: tuple[int, ...]) -> str:
        return ", ".join(map(str, reversed(shape)))

    second = sources[1] if len(sources) > 1 else ""
    lines = [f"{function}: {name:>24} = ({kind}) {operation:>10}({sources[0]}, {second}}}) = {{{sides(values.shape)}}}"]
    pad = " " * 4
    with np.errstate(all="ignore"):
        total = np.cumsum(values.astype(np.float32).reshape(-1), dtype=np.float32)[-1]
    for block in values:
        lines.append(f"{pad}[")
        for plane in _some(block):
            lines.append(f"{pad * 2}..., " if plane is None else f"{pad * 2}[")
            if plane is None:
                continue
            for row in _some(plane):
                if row is None:
                    lines.append(f"{pad * 3}..., ")
                    continue
                figures = [None if x is None else f"{x:12.4f}" for x in _some(row)]
                text = ", ".join("   ..." if x is None else x for x in figures)
                lines.append(f"{pad * 3}[{text}  ],")
            lines.append(f"{pad * 2}],")
        lines += [f"{pad}]", f"{pad}sum = {total:f}"]
    return "\n".join(lines)


def _some(items: Any) -> list[Any]:
    return list(items) if len(items) <= 2 * SHOWN else [*items[:SHOWN], None, *items[-SHOWN:]]


class Printer:
    """The callback: prints every node that has floats or whole numbers."""

    def __init__(self, lib: Any, function: str) -> None:
        self.lib, self.function = lib, function

    def __call__(self, tensor: int, ask: bool, user: int) -> bool:
        if ask:
            return True
        kind = self.lib.ggml_type_name(ctypes.c_int32.from_address(tensor).value).decode()
        if kind in TYPES:
            sources = [s for s in (ctypes.c_void_p * 2).from_address(tensor + SOURCES) if s]
            said = [f"{self._name(s)}{{{', '.join(map(str, self._four(s, NE)))}}}" for s in sources]
            operation = self.lib.ggml_op_desc(tensor).decode()
            print(printed(self._name(tensor), kind, operation, said or [""], self._values(tensor, kind), self.function))
        return True

    def _name(self, tensor: int) -> str:
        return str(self.lib.ggml_get_name(tensor).decode())

    def _four(self, tensor: int, at: int) -> list[int]:
        return [int(n) for n in (ctypes.c_int64 * 4).from_address(tensor + at)]

    def _values(self, tensor: int, kind: str) -> np.ndarray:
        raw = np.empty(self.lib.ggml_nbytes(tensor), np.uint8)
        self.lib.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, raw.nbytes)
        shape, steps = self._four(tensor, NE)[::-1], self._four(tensor, NB)[::-1]
        return np.lib.stride_tricks.as_strided(raw.view(TYPES[kind]), shape, steps)


def main(model: str, prompt: str, function: str = "common_debug_cb_eval", flash: str = "0") -> None:
    api = llama_api.opened()
    lib = api.calls
    quiet = llama_api.Logger(lambda level, line, user: None)
    lib.llama_log_set(quiet, None)
    loaded = lib.llama_model_load_from_file(os.fsencode(model), lib.llama_model_default_params())
    heard = llama_api.Watcher(Printer(lib, function))
    values: dict[str, float] = {"n_ctx": 256, "cb_eval": llama_api.address(heard), "flash_attn_type": int(flash)}
    context = lib.llama_init_from_model(loaded, api.changed(values))
    data, vocabulary = prompt.encode(), lib.llama_model_get_vocab(loaded)
    ids = (ctypes.c_int32 * (len(data) + 8))()
    count = lib.llama_tokenize(vocabulary, data, len(data), ids, len(ids), True, True)
    print(f"number of input tokens = {count}\n" + "".join(f"  {id}\n" for id in ids[:count]))
    lib.llama_decode(context, lib.llama_batch_get_one(ids, count))


if __name__ == "__main__":
    main(*sys.argv[1:])
