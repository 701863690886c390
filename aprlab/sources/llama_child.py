"""llama.cpp in a process of its own, so that a crash of it takes nothing else down.

``python -m aprlab.sources.llama_child FD LOG PARENT PACKAGE``: requests come in over a connection (the parent's pipe), replies
go back; whatever llama.cpp prints goes to the log.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from aprlab.errors import AprlabError, UnsupportedError
from aprlab.paths import leave_with_parent
from aprlab.sources import llama_api
from aprlab.sources.llama_nodes import Nodes

# (trace point, its values (T, …) float32, position of the first) -> other values, or None to leave them
Edit = Callable[[str, np.ndarray, int], "np.ndarray | None"]
Inject = Mapping[str, tuple[np.ndarray, np.ndarray]]  # point -> values, their positions


BY_HEAD = ("_rope", ".q_norm", ".k_norm")  # positions, heads, values of a head; the others have no axis of heads


class Watch:
    """Is called before and after each node of a pass: keeps values, and writes others."""

    def __init__(self, lib: Any, wanted: set[str], inject: Inject, edit: Edit | None, *, biased: bool) -> None:
        self.lib, self.wanted, self.inject, self.edit = lib, wanted, inject, edit
        self.kept: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        self.operations: set[str] = set()
        self.error: Exception | None = None
        self.start = self.seen = 0  # positions before this part of the pass; and with it
        self.nodes = Nodes(biased=biased)
        self.point: str | None = None

    def __call__(self, tensor: int, ask: bool, user: int) -> bool:
        try:
            if ask:
                name, operation = self.lib.ggml_get_name(tensor).decode(), self.lib.ggml_op_desc(tensor).decode()
                self.operations.add(operation)
                self.point = self.nodes.point(name, operation)
                if self.point is None:
                    return False
                return self.edit is not None or self.point == "embed" or self.point in self.wanted or self.point in self.inject
            self._take(tensor, self.point or "")
        except Exception as error:  # nothing may pass through C
            self.error = self.error or error
            return False  # ends the pass
        return True

    def _take(self, tensor: int, point: str) -> None:
        values = self._read(tensor, point)
        if point == "embed":
            self.start, self.seen = self.seen, self.seen + len(values)
        changed = None if self.edit is None else self.edit(point, values, self.start)
        if point in self.inject:
            given, positions = self.inject[point]
            inside = (positions >= self.start) & (positions < self.start + len(values))
            if inside.any():
                changed = values.copy() if changed is None else np.array(changed)
                changed[positions[inside] - self.start] = given[inside].reshape(-1, *changed.shape[1:])
        if changed is not None:
            values = np.ascontiguousarray(changed, np.float32).reshape(values.shape)
            self.lib.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        if point in self.wanted:
            self.kept[point].append(values)

    def _read(self, tensor: int, point: str) -> np.ndarray:
        kind = ctypes.c_int32.from_address(tensor).value  # the first field of ggml_tensor
        shape = [int(n) for n in (ctypes.c_int64 * 4).from_address(tensor + 16)]  # ne: the fastest first
        by_head = point.endswith(BY_HEAD)
        while len(shape) > 2 + by_head and shape[-1] == 1:
            shape.pop()
        values = np.empty(shape[::-1], np.float32)
        if kind != 0 or values.nbytes != self.lib.ggml_nbytes(tensor) or not self.lib.ggml_is_contiguous(tensor):
            said = f"llama.cpp keeps {point} as {self.lib.ggml_type_name(kind).decode()}{shape}, which is not read here"
            raise UnsupportedError(said, code="source.llama-unknown")
        self.lib.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        return values


class Llama:
    """The library with one model in it."""

    def __init__(self, package: str) -> None:
        self.api = llama_api.opened(package)
        self.lib = self.api.calls
        self.said: list[str] = []
        self._log = llama_api.Logger(self._hear)
        self.lib.llama_log_set(self._log, None)
        self.model: int | None = None

    def _hear(self, level: int, line: bytes, user: int) -> None:
        if level >= 4:  # errors
            self.said.append(line.decode(errors="replace").strip())

    def _why(self) -> str:
        return self.said[0] if self.said else "it does not say why"

    def do_load(self, file: str, repack: bool | None) -> dict[str, Any]:
        self.api.changed({})  # a layout that is not known is refused before anything else
        self.model = self.lib.llama_model_load_from_file(os.fsencode(file), self.api.model(repack))
        if not self.model:
            raise UnsupportedError(f"llama.cpp does not load it: {self._why()}", code="source.llama-refuses", path=file)
        vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        return {"version": self.api.version, "vocabulary": vocabulary}

    def do_tokens(self, text: str) -> list[int]:
        data, vocabulary = text.encode(), self.lib.llama_model_get_vocab(self.model)
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self.lib.llama_tokenize(vocabulary, data, len(data), ids, len(ids), True, True)
        return list(ids[: max(count, 0)])

    def do_run(
        self, tokens: list[int], prompt: int, points: list[str], cache: int, flash: bool, threads: int | None,
        inject: Inject, edit: tuple[str, dict[str, Any]] | None, biased: bool,
    ) -> dict[str, Any]:  # fmt: skip
        watch = Watch(self.lib, set(points), inject, _edit(edit), biased=biased)
        heard = llama_api.Watcher(watch)
        values: dict[str, float] = {
            "n_ctx": -(-max(len(tokens), 1) // 256) * 256, "flash_attn_type": int(flash), "type_k": cache, "type_v": cache,
            "cb_eval": llama_api.address(heard),
        }  # fmt: skip
        if threads is not None:
            values |= {"n_threads": threads, "n_threads_batch": threads}
        context = self.lib.llama_init_from_model(self.model, self.api.changed(values))
        if not context:
            raise UnsupportedError(f"llama.cpp makes no context: {self._why()}", code="source.llama-refuses")
        try:
            for some in (tokens[:prompt], *([token] for token in tokens[prompt:])):
                self._decode(context, watch, some)
        finally:
            self.lib.llama_free(context)
        if ("FLASH_ATTN_EXT" in watch.operations) != flash:
            said = f"llama.cpp was asked for flash attention {'on' if flash else 'off'} and did otherwise"
            raise UnsupportedError(said, code="source.llama-unknown")
        if missing := [name for name in points if sum(map(len, watch.kept[name])) != len(tokens)]:
            said = f"llama.cpp's graph shows {missing[0]} for {sum(map(len, watch.kept[missing[0]]))} of {len(tokens)} positions"
            raise UnsupportedError(said, code="source.llama-unknown")
        return {name: np.concatenate(watch.kept[name]) for name in points}

    def _decode(self, context: int, watch: Watch, some: list[int]) -> None:
        ids, all_of_them = (ctypes.c_int32 * len(some))(*some), (ctypes.c_int8 * len(some))(*[1] * len(some))
        batch = self.lib.llama_batch_get_one(ids, len(some))
        batch.logits = ctypes.addressof(all_of_them)
        status = self.lib.llama_decode(context, batch)
        if watch.error is not None:
            raise watch.error
        if status:
            raise UnsupportedError(f"llama_decode gives {status}: {self._why()}", code="source.llama-refuses")


def _edit(spec: tuple[str, dict[str, Any]] | None) -> Edit | None:
    """What ``("module:factory", arguments)`` makes."""
    if spec is None:
        return None
    module, _, name = spec[0].partition(":")
    made: Edit = getattr(import_module(module), name)(**spec[1])
    return made


def serve(link: Connection, package: str) -> None:
    """Answer requests until the other end is gone."""
    llama: Llama | None = None
    while True:
        try:
            request = link.recv()
        except EOFError:
            return
        try:
            llama = llama or Llama(package)
            link.send(("ok", getattr(llama, f"do_{request.pop('op')}")(**request)))
        except AprlabError as error:
            link.send(("refused", error))
        except Exception as error:
            link.send(("failed", f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    leave_with_parent(int(sys.argv[3]))
    serve(Connection(int(sys.argv[1])), sys.argv[4])
