"""llama.cpp as a source: every operation read and written, in a process of its own.

Its contract is its own choice: keys and values in half precision unless asked otherwise, activations rounded to 8 bits for
quantised weights. Both are declared, and how attention was computed is verified in the graph of each run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.architectures import points as all_points
from aprlab.engines.contracts import Contract
from aprlab.errors import NumericError, UsageError
from aprlab.formats import leftovers, open_model
from aprlab.model.model import Model
from aprlab.sources import llama_api
from aprlab.sources.base import Abilities, Source
from aprlab.tracing.traces import Point, Trace

NAME = "llama.cpp"
PYTHON = "llama-cpp-python"  # llama.cpp through this package, whatever else is installed
_CACHES = {"f32": 0, "f16": 1}  # ggml's codes


class LlamaSource(Source):
    """A GGUF file in llama.cpp.

    Args:
        model: the file (GGUF).
        cache: type of keys and values, ``f16`` (llama.cpp's default) or ``f32``.
        flash: attention as one operation, which reads keys and values in half precision whatever type they are kept in (its
            graph casts them): the contract says so.
        threads: CPU threads; None leaves the number to llama.cpp.
        package: the one that llama.cpp is reached through, ``xllamacpp`` or ``llama-cpp-python``; None for the first of
            them that is installed.
        repack: whether llama.cpp may lay the weights out anew for the processor's kernels (AMX and others); None leaves that
            to llama.cpp.
        edit: ``("module:factory", arguments)``, what the child makes of it is called with point, values and the first
            position at each point and may return other values: llama.cpp made faulty on purpose.

    Raises:
        UsageError: the package is not installed, or an unknown type of cache.
        UnsupportedError: a version whose parameters lie elsewhere, or a file that llama.cpp does not load.
    """

    def __init__(
        self, model: str | Path | Model, *, cache: str = "f16", flash: bool = False, threads: int | None = None,
        package: str | None = None, repack: bool | None = None, edit: tuple[str, dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        if cache not in _CACHES:
            raise UsageError(f"llama.cpp: cache {cache!r}; known: {', '.join(_CACHES)}", code="source.bad-option")
        opened = model if isinstance(model, Model) else open_model(model)
        self.name, self.file, self.config = PYTHON if package == PYTHON else NAME, Path(opened.path), opened.config
        self.contract = Contract(activations_of(opened), "f16" if flash else cache, flash)
        self.can = Abilities(tuple(all_points(self.config)), injection=True)
        self._threads, self._edit, self._cache = threads, edit, _CACHES[cache]
        self._biased = "blk.0.attn_q.bias" in opened.tensors
        self._child = LlamaProcess(package)
        try:
            self.version = self._child.ask("load", file=os.fspath(self.file), repack=repack)["version"]
        except BaseException:
            self.close()
            raise

    def _run(self, ids: list[int], wanted: list[str], first: int, inject: Mapping[str, Point]) -> Trace:
        written = {name: (point.values, point.positions) for name, point in inject.items()}
        found = self._child.ask(
            "run", tokens=ids, prompt=first, points=wanted, cache=self._cache, flash=self.contract.flash,
            threads=self._threads, inject=written, edit=self._edit, biased=self._biased,
        )  # fmt: skip
        shapes, positions, contract = all_points(self.config), np.arange(len(ids), dtype=np.int64), str(self.contract)
        kept = {name: Point(name, found[name].reshape(-1, *shapes[name]), positions, self.name, contract) for name in wanted}
        origin = {"path": str(self.file), "format": "gguf", "version": self.version}
        return Trace(kept, ids, self.name, contract, self.config, origin, first)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text as llama.cpp's own tokenizer gives them, with the special tokens that it adds."""
        ids: list[int] = self._child.ask("tokens", text=text)
        return ids

    def close(self) -> None:
        self._child.close()


def activations_of(model: Model) -> str:
    """How ggml rounds the activations of this model's products: by the types of its matrices."""
    kinds = {t.type.name for name, t in model.tensors.items() if len(t.shape) == 2 and name != "token_embd.weight"}
    if "output.weight" not in model.tensors:
        kinds.add(model.tensor("token_embd.weight").type.name)
    alone = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
    return alone.get(min(kinds), "q8") if len(kinds) == 1 else "q8"


class LlamaProcess:
    """The process that llama.cpp lives in; started at once."""

    def __init__(self, package: str | None = None) -> None:
        found = llama_api.door(package)
        mine, its = Pipe()
        self._link: Connection = mine
        leftovers.sweep_temporary("aprlab-llama-")
        self._log = tempfile.NamedTemporaryFile(prefix="aprlab-llama-", suffix=".log")  # noqa: SIM115 - closed by `close`
        leftovers.claim(self._log.fileno())
        arguments = [str(its.fileno()), self._log.name, str(os.getpid()), found.package]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aprlab.sources.llama_child", *arguments], pass_fds=[its.fileno()], stdin=subprocess.DEVNULL
        )
        its.close()

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Its reply; raises what it refused with, or NumericError where llama.cpp crashed."""
        try:
            self._link.send({"op": operation, **arguments})
            kind, reply = self._link.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise NumericError(f"llama.cpp crashed: its process {how}{self._last_words()}", code="source.llama-crashed") from None
        if kind == "ok":
            return reply
        if kind == "refused":
            raise reply
        raise NumericError(f"llama.cpp's process failed: {reply}", code="source.llama-crashed")

    def _last_words(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; its last line: {last:.200}" if last else ""

    def close(self) -> None:
        """End the process."""
        self._link.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
