"""What `llama-eval-callback` prints, as a source: of each tensor the first and last three values of every axis, and the sum.

That is too little to compute an operation again, so these are no traces: what is printed is compared with our own run. The
layout is that of llama.cpp's ``common/debug.cpp`` and of the example before it (``ggml_debug: …``); names are mapped to points as
in llama.cpp's graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.architectures import points as all_points
from aprlab.engines.contracts import Contract
from aprlab.errors import FormatError, UsageError
from aprlab.formats.reading import read_bytes
from aprlab.model.model import Model
from aprlab.sources.base import Abilities, Source
from aprlab.sources.llama_cpp import activations_of
from aprlab.sources.llama_nodes import Nodes

NAME = "llama-eval-callback"
ENDINGS = (".txt", ".log")
FILE_LIMIT = 256 << 20  # bytes; the 0.5B prints 3 MB for a prompt
# <function>: <name> = (<type>) <operation>(<first source>{…}, <second>{…}}) = {<sizes, the fastest first>}
_HEAD = re.compile(
    r"(?:^|\s)[\w<>]+:\s+(?P<name>\S.{0,80}?) = \((?P<type>\w+)\)\s+(?P<op>\w+)\(.{0,400}?\) = \{(?P<ne>[\d, ]{1,80})\}\s*$"
)
_NUMBER = re.compile(r"[-+]?(?:\d+\.\d+(?:e[-+]?\d+)?|nan|inf)", re.IGNORECASE)
_COUNT = re.compile(r"number of input tokens = (\d+)\s*$")
_SUM = re.compile(r"^\s*sum = (\S+)\s*$")


@dataclass
class Printed:
    """One tensor as it was printed.

    Attributes:
        point: the trace point that it is.
        line: of its head in the file, from 1 on.
        shape: NumPy order, positions first, e.g. ``(T, H, D)``.
        at: index of each value in the flattened tensor, int64.
        values: float64, as many.
        half: half a unit of the last digit printed.
        sum: of all its values in float32; None where it was not printed.
    """

    point: str
    line: int
    shape: tuple[int, ...]
    at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    half: float = 0.0
    sum: float | None = None


class PrintoutSource(Source):
    """A text that `llama-eval-callback` (or `llama-debug`) left.

    Args:
        path: the text.
        model: what it ran.
        contract: what it may round; None: llama.cpp's own for this file, flash attention as the graph shows it.

    Attributes:
        tensors: those that are trace points, of the first pass, in the order of the graph.
        ids: the prompt's, where the text lists them.
        count: positions of the pass.

    Raises:
        FormatError: it is no such text, or one of a model of other sizes.
    """

    def __init__(self, path: str | Path, model: Model, contract: Contract | None = None) -> None:
        self.name, self.version, self.file, self.config = NAME, "", Path(path), model.config
        reader = _PrintoutReader(self.file, model)
        self.tensors, self.ids, self.count = reader.tensors, reader.ids, reader.count
        self.contract = contract if contract is not None else Contract(activations_of(model), "f16", reader.flash)
        self.can = Abilities((), positions="given", logits="none", reruns=False)


class _PrintoutReader:
    """Reads the text line by line."""

    def __init__(self, path: Path, model: Model) -> None:
        self.path, self.shapes = path, all_points(model.config)
        self.nodes = Nodes(biased="blk.0.attn_q.bias" in model.tensors)
        self.tensors: list[Printed] = []
        self.ids: list[int] = []
        self.count, self.flash = 0, False
        try:
            lines = read_bytes(path, FILE_LIMIT).decode(errors="replace").splitlines()
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror or error}", code="printout.unreadable", path=path) from None
        self._read(lines)
        if not self.tensors:
            example = "'ggml_debug: embd = (f32) GET_ROWS(…) = {896, 5, 1, 1}', then values"
            said = f"has no tensor of this model as llama-eval-callback prints it: {example}"
            raise FormatError(said, code="printout.none", path=path)

    def _read(self, lines: Sequence[str]) -> None:
        heads = [(n, hit) for n, line in enumerate(lines) if (hit := _HEAD.search(line)) is not None]
        self._listed_ids(lines[: heads[0][0] if heads else 0])
        seen: set[str] = set()
        ends = [*(n for n, _ in heads[1:]), len(lines)]
        for (n, head), end in zip(heads, ends, strict=bool(heads)):
            self.flash = self.flash or head["op"] == "FLASH_ATTN_EXT"
            point = self.nodes.point(head["name"], head["op"])
            if point is None or head["type"] != "f32" or point not in self.shapes:
                continue
            if point in seen:
                break  # the next pass, or the same run printed again
            seen.add(point)
            self.tensors.append(self._tensor(point, n, head["ne"], lines[n + 1 : end]))

    def _listed_ids(self, lines: Sequence[str]) -> None:
        """After ``number of input tokens = N`` newer versions list them, one a line."""
        for n, line in enumerate(lines):
            hit = _COUNT.search(line)
            if hit is not None:
                words = " ".join(lines[n + 1 :]).split()[: int(hit[1]) if len(hit[1]) < 7 else 0]
                self.ids = [int(w) for w in words if w.isdecimal() and len(w) < 10]

    def _tensor(self, point: str, n: int, sizes: str, body: Sequence[str]) -> Printed:
        ne = [int(word) for word in sizes.replace(",", " ").split()]
        size = int(np.prod(self.shapes[point]))
        shape = ne[::-1]
        cut = [n for n in range(len(ne) - 1) if set(shape[:n]) <= {1} and np.prod(shape[n + 1 :], dtype=float) == size]
        if len(ne) != 4 or not cut or not 0 < shape[cut[-1]] < 1 << 24:
            said = f"line {n + 1}: {point} is {{{sizes}}}, which is not {size:,} values for each position of this model"
            raise FormatError(said, code="printout.other-model", path=self.path)
        inside = shape[cut[-1] :]
        self.count = max(self.count, inside[0])
        found = Printed(point, n + 1, tuple(inside))
        try:
            self._values(found, shape, body)
        except (ValueError, IndexError):
            said = f"line {n + 1}: the values of {point} are not in the order of {{{sizes}}}"
            raise FormatError(said, code="printout.values", path=self.path) from None
        return found

    def _values(self, into: Printed, shape: list[int], body: Sequence[str]) -> None:
        """Values with their places: brackets say the axis, ``...`` that the rest are the last ones of it."""
        rows = list(_rows(body))
        tree = _nested(rows, len(shape) - 1)
        at, values = [], []
        for index, row in _placed(tree, shape[:-1]):
            figures = [word.strip() for word in row.strip().strip("[],").split(",")]
            for column, text in _line(figures, shape[-1]):
                if _NUMBER.fullmatch(text) is None:
                    raise ValueError(text)
                at.append(np.ravel_multi_index((*index, column), shape))
                values.append(float(text))
                digits = text.lower().partition(".")[2].partition("e")[0]
                into.half = max(into.half, 0.5 * 10.0 ** -len(digits) if digits else 0.0)
        into.at, into.values = np.array(at, np.int64), np.array(values, np.float64)
        for line in body:
            hit = _SUM.match(line)
            if hit is not None:
                into.sum = float(hit[1])
                break
        if not at and into.sum is None:
            raise ValueError("nothing was printed")


def _rows(body: Sequence[str]) -> Iterator[str]:
    """Lines up to the sum, or to what is no part of the values."""
    for line in body:
        text = line.strip()
        if not text or text[0] not in "[].":
            return
        yield text


def _nested(rows: Sequence[str], depth: int) -> list[Any]:
    """Lists of lists of rows; an ellipsis is None."""
    stack: list[list[Any]] = [[]]
    for text in rows:
        if text == "[":
            stack.append([])
        elif text.startswith("..."):
            stack[-1].append(None)
        elif text.startswith("["):
            stack[-1].append(text)
        else:
            done = stack.pop()
            stack[-1].append(done)
    if len(stack) != 1:
        raise ValueError("brackets")
    return stack[0]


def _line(items: Sequence[Any], size: int) -> Iterator[tuple[int, Any]]:
    """Items of an axis with their index: all of them, or the first and the last ones around an ellipsis."""
    gap = next((n for n, item in enumerate(items) if item is None or item == "..."), None)
    if gap is None:
        if len(items) != size:
            raise ValueError("length")
        yield from enumerate(items)
        return
    after = [item for item in items[gap + 1 :] if item != ""]
    if gap + len(after) >= size:
        raise ValueError("length")
    yield from enumerate(items[:gap])
    yield from ((size - len(after) + n, item) for n, item in enumerate(after))


def _placed(tree: Sequence[Any], shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str]]:
    for n, item in _line(tree, shape[0]):
        if len(shape) == 1:
            if not isinstance(item, str):
                raise ValueError("depth")
            yield (n,), item
        else:
            if not isinstance(item, list):
                raise ValueError("depth")
            yield from (((n, *index), row) for index, row in _placed(item, shape[1:]))


__all__ = ["ENDINGS", "Printed", "PrintoutSource"]
