"""The matrix of a sweep: a YAML file, checked whole before anything runs, and the cells that it means."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprlab.errors import FormatError, UsageError
from aprlab.formats.yaml_files import LineOf, load
from aprlab.lab import notebooks as lab

MOST_CELLS = 20_000  # runs of one matrix, before exclusions; a run takes seconds at least
KEYS = ("notebooks", "parameters", "matrix", "exclude")
_PLAIN = (str, int, float, bool)


_Refuse = Callable[..., FormatError]


@dataclass(frozen=True)
class SweepCell:
    """One run of a sweep: a notebook and its parameters.

    Attributes:
        notebook: path of the notebook; its stem is its name.
        axes: the parameters that vary, in the order of the matrix.
        parameters: all parameters, the fixed ones included.
        id: name of its folder: readable, unique, the same in every run of the matrix.
    """

    notebook: Path
    axes: Mapping[str, Any]
    parameters: Mapping[str, Any]
    id: str

    @property
    def key(self) -> str:
        """Changes with the notebook's source, the parameters, and size or time of a file that a parameter names."""
        state: dict[str, Any] = {
            "notebook": hashlib.sha256(self.notebook.read_bytes()).hexdigest(),
            "parameters": self.parameters,
        }
        for name, value in self.parameters.items():
            if isinstance(value, str) and value and Path(value).is_file():
                seen = Path(value).stat()
                state[f"file {name}"] = [seen.st_size, seen.st_mtime_ns]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_matrix(path: str | Path) -> list[SweepCell]:
    """The cells of a matrix file, in order: notebooks outermost, then the axes as written.

    ::

        notebooks: [07_peel]                # names of the project's notebooks, or paths relative to this file
        parameters: {prompt: What is 2+2?}  # the same for all runs
        matrix:                             # every combination is run
          fault: [GH-191, lost-qkv-biases]
          engine: [reference, jit]
        exclude:                            # but those that match one of these
          - {fault: GH-191, engine: jit}

    A relative path of a file (a parameter named model, reference or candidate) is meant from the folder of the matrix.

    Raises:
        UsageError, FormatError: with the line: an unknown key, a notebook that there is not, a parameter that one of the
            notebooks does not declare or whose type is another, an exclusion that excludes nothing, the same run twice.
    """
    path = Path(path)
    data, line_of = load(path)

    def refuse(message: str, *keys: str | int, code: str) -> FormatError:
        return FormatError(f"line {line_of(*keys)}: {message}", code=code, path=path)

    if not isinstance(data, dict):
        raise refuse(f"expected a mapping with {', '.join(KEYS)}, not {_kind(data)}", code="sweep.wrong-kind")
    for name in data:
        if name not in KEYS:
            raise refuse(f"unknown key {name!r}; known: {', '.join(KEYS)}", name, code="sweep.unknown-key")
    fixed, axes = (_mapping(data.get(part), part, refuse) for part in ("parameters", "matrix"))
    _check_axes(axes, fixed, refuse)
    notebooks = _notebooks(data.get("notebooks"), path.parent, refuse)
    exclude = _exclusions(data.get("exclude"), axes, refuse)
    count = len(notebooks) * math.prod(map(len, axes.values()))
    if count * (1 + len(exclude)) > MOST_CELLS:  # counted before they are made
        rules = f" and {len(exclude)} exclusions" if exclude else ""
        raise refuse(f"{count} runs{rules} to look at; at most {MOST_CELLS} are taken", "matrix", code="sweep.too-many-runs")
    for notebook in notebooks:
        _check(notebook, fixed, axes, path.parent, line_of, path)
    return _cells(notebooks, fixed, axes, exclude, path.parent, refuse)


def _cells(
    notebooks: Sequence[Path], fixed: Mapping[str, Any], axes: Mapping[str, list[Any]], exclude: Sequence[Mapping[str, Any]],
    folder: Path, refuse: _Refuse,
) -> list[SweepCell]:  # fmt: skip
    """Every combination that no exclusion takes away; refuses an exclusion that takes none, and the same run twice."""
    cells: list[SweepCell] = []
    used: set[int] = set()
    for notebook in notebooks:
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            hit = [n for n, rule in enumerate(exclude) if all(_same(point[name], value) for name, value in rule.items())]
            used.update(hit)
            if not hit:
                cells.append(_cell(notebook, point, fixed, folder))
    for n in range(len(exclude)):
        if n not in used:
            raise refuse("excludes nothing", "exclude", n, code="sweep.excludes-nothing")
    if not cells:
        raise refuse("nothing is left to run", code="sweep.nothing-left")
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            raise refuse(f"the same run twice: {cell.id}", "matrix", code="sweep.same-run-twice")
        seen.add(cell.id)
    return cells


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _same(a: object, b: object) -> bool:
    """Equal and of one type: 1 is not true."""
    return type(a) is type(b) and a == b


def _mapping(value: Any, part: str, refuse: _Refuse) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refuse(f"{part!r} must be a mapping, not {_kind(value)}", part, code="sweep.wrong-kind")
    for name in value:
        if not isinstance(name, str):
            raise refuse(f"a parameter's name is a word, not {name!r}", part, name, code="sweep.wrong-kind")
        if name == "out":
            raise refuse("'out' is set by the sweep", part, name, code="sweep.out-is-set")
    return value


def _check_axes(axes: Mapping[str, Any], fixed: Mapping[str, Any], refuse: _Refuse) -> None:
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            wrong = f"{name!r} must be a list of at least one value, not {_kind(values)}"
            raise refuse(wrong, "matrix", name, code="sweep.wrong-kind")
        if name in fixed:
            raise refuse(f"{name!r} is under `parameters` as well", "matrix", name, code="sweep.axis-and-parameter")


def _notebooks(value: Any, folder: Path, refuse: _Refuse) -> list[Path]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise refuse("'notebooks' must be a list of names", "notebooks", code="sweep.wrong-kind")
    found = []
    for n, name in enumerate(value):
        try:
            found.append(lab.find_notebook(folder / name if name.endswith(".ipynb") else name).resolve())
        except UsageError as error:
            raise refuse(error.message, "notebooks", n, code="sweep.unknown-notebook") from None
        if found[-1] in found[:-1]:
            raise refuse(f"notebook {name!r} again", "notebooks", n, code="sweep.same-notebook-twice")
    return found


def _exclusions(value: Any, axes: Mapping[str, list[Any]], refuse: _Refuse) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise refuse(f"'exclude' must be a list, not {_kind(value)}", "exclude", code="sweep.wrong-kind")
    for n, rule in enumerate(value):
        if not isinstance(rule, dict) or not rule:
            raise refuse(f"expected a mapping of axes to values, not {_kind(rule)}", "exclude", n, code="sweep.wrong-kind")
        for name in rule:
            if name not in axes:
                raise refuse(f"{name!r} is not an axis of the matrix; there are: {', '.join(axes) or 'none'}", "exclude", n, name,
                             code="sweep.unknown-axis")  # fmt: skip
    return value


_FILES = ("model", "reference", "candidate")


def _absolute(parameters: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Parameters with the paths of files made absolute: a kernel runs in another folder."""
    return {
        name: str((folder / Path(value).expanduser()).resolve()) if name in _FILES and isinstance(value, str) and value else value
        for name, value in parameters.items()
    }


def _check(
    notebook: Path, fixed: Mapping[str, Any], axes: Mapping[str, list[Any]], folder: Path, line_of: LineOf, path: Path
) -> None:
    """Every value against what the notebook declares, by the strict rules of `lab.check_parameters`."""
    places = [(("parameters", name), name, value) for name, value in fixed.items()]
    places += [(("matrix", name, n), name, value) for name, values in axes.items() for n, value in enumerate(values)]  # type: ignore[misc]
    for keys, name, value in places:
        if type(value) not in _PLAIN:
            raise FormatError(
                f"line {line_of(*keys)}: {name!r} must be a word or a number, not {_kind(value)}",
                code="sweep.wrong-kind", path=path,
            )  # fmt: skip
        try:
            lab.check_parameters(notebook, {name: value})
        except UsageError as error:
            raise FormatError(f"line {line_of(*keys)}: {error.message}", code="sweep.bad-parameter", path=path) from None
        file = _absolute({name: value}, folder)[name]
        if name in _FILES and value and not Path(file).is_file():
            raise FormatError(f"line {line_of(*keys)}: there is no file {value!r}", code="sweep.no-such-file", path=path)


def _cell(notebook: Path, point: Mapping[str, Any], fixed: Mapping[str, Any], folder: Path) -> SweepCell:
    parameters = _absolute({**fixed, **point}, folder)
    words = [notebook.stem, *(f"{name}={Path(v).stem if name in _FILES else v}" for name, v in point.items() if v != "")]
    readable = re.sub(r"[^\w=.+-]+", "-", "_".join(words))[:80].strip("-.")
    digest = hashlib.sha256(json.dumps([notebook.stem, point, dict(fixed)], sort_keys=True).encode()).hexdigest()[:8]
    return SweepCell(notebook, dict(point), parameters, f"{readable}_{digest}")
