"""Anyone's PTX against a tensor: does this kernel dequantise it, or multiply it, as it should?

A `Job` describes one kernel launch on one tensor; `run`, `profile`, `check` and `step` execute it. Arguments are
given in the order of the kernel's parameters as short specifications:

    weights                       the tensor's raw blocks
    x, x:f16, x:q8_0, x:q8_1      activations, in float32 or as ggml's blocks
    out, out:f16                  the result
    null                          a null pointer
    NAME:BYTES                    a zeroed buffer, shared by all launches of the job under this name (then just NAME)
    rows, cols, elements, blocks, row_bytes, block_bytes    these sizes as scalars
    NAME=NUMBER                   any other scalar; an expression in those sizes

A kernel with x among its arguments is a mat-vec, one without a dequantisation. In expressions and extents `/` rounds
up.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.kernels.ptx.machine import KernelFault, LaunchReport, Machine
from aprlab.kernels.ptx.memory import Pointer
from aprlab.kernels.ptx.parser import Module, parse
from aprlab.kernels.ptx.stepper import Stepper
from aprlab.model.tensor import Tensor

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: lambda a, b: -(-a // b), ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip
MOST_BUFFER = 4 << 30  # bytes of one buffer among the arguments
MOST_TEXT = 32 << 20  # bytes of one PTX file
_ACTIVATIONS = ("f32", "f16", "q8_0", "q8_1")
_OUTPUTS = ("f32", "f16")


@dataclass(frozen=True)
class PlannedLaunch:
    """One launch: the entry, its grid and block (expressions), argument specifications, dynamic shared memory in
    bytes.
    """

    entry: str
    grid: str
    block: str
    args: tuple[str, ...]
    shared: int = 0


@dataclass(frozen=True)
class KernelComparison:
    """A kernel's output next to the right one.

    `worst` is the largest |difference|, `scale` the largest |right value|, `allowed` what rounding can explain at the
    worst place (0 for a dequantisation, which must be equal bit for bit), `wrong` the number of values beyond it,
    `unwritten` those never stored.
    """

    operation: str
    values: int
    wrong: int
    unwritten: int
    worst: float
    scale: float
    allowed: float
    at: tuple[int, ...]
    got: float
    want: float

    @property
    def right(self) -> bool:
        return self.wrong == 0 and self.unwritten == 0

    @property
    def relative(self) -> float:
        return self.worst / self.scale if self.scale else self.worst


@dataclass(frozen=True)
class KernelRun:
    """What `run` returns: the report of the last launch, the output and its comparison."""

    report: LaunchReport
    output: np.ndarray[Any, Any]
    comparison: KernelComparison


def load(path: str | Path) -> Module:
    """Parse a PTX file; errors carry its path."""
    path = Path(path)
    if not path.is_file():
        raise UsageError("no such file", code="ptx.file-missing", path=path)
    if (size := path.stat().st_size) > MOST_TEXT:
        raise UnsupportedError(f"{size} bytes of PTX; at most {MOST_TEXT} are read", code="ptx.text-limit", path=path)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", code="ptx.file-unreadable", path=path) from None
    except UnicodeDecodeError as error:
        raise FormatError("not PTX: the file is not text", code="ptx.encoding", path=path) from error
    except (FormatError, UnsupportedError) as error:
        raise type(error)(error.message, code=error.code, path=path) from error


def evaluate(text: str, names: Mapping[str, int]) -> int:
    """An integer expression in `names`, with `/` rounding up. Raises `UsageError` for anything else."""

    def walk(node: ast.AST) -> int:
        if isinstance(node, ast.Expression):
            return walk(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        raise UsageError(f"cannot read {text!r}; known names: {', '.join(names)}", code="ptx.expression")

    try:
        return walk(ast.parse(text.strip(), mode="eval"))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise UsageError(f"cannot read {text!r} as a number: {error}", code="ptx.expression") from error


class Job:
    """A chain of launches on one tensor; the last one's output is compared.

    module: parsed PTX. tensor: a matrix (its first `rows` rows; 0: all). steps: launches in order. seed: of the
    activations.
    """

    def __init__(self, module: Module, tensor: Tensor, steps: Sequence[PlannedLaunch], *, rows: int = 0, seed: int = 0) -> None:
        if not steps:
            raise UsageError("nothing to launch", code="ptx.steps-missing")
        if not any(spec.split(":")[0].strip() == "out" for step in steps for spec in step.args):
            raise UsageError("no argument is `out`: there would be nothing to compare", code="ptx.output-missing")
        self.machine = Machine(module)
        self.tensor, self.steps = tensor, list(steps)
        self.rows = min(rows, tensor.rows) if rows else tensor.rows
        self.cols = tensor.cols
        self.raw = np.ascontiguousarray(tensor.blocks()[: self.rows])
        self.raw.flags.writeable = False
        self.x = np.random.default_rng(seed).standard_normal(self.cols).astype(np.float32)
        blocks = self.rows * self.cols // tensor.type.block_elements
        self.sizes = {
            "rows": self.rows, "cols": self.cols, "elements": self.rows * self.cols, "blocks": blocks,
            "row_bytes": tensor.type.row_bytes(self.cols), "block_bytes": tensor.type.block_bytes,
        }  # fmt: skip
        self._buffers: dict[str, Any] = {}
        self._activation = ""
        self.out: np.ndarray[Any, Any] | None = None

    @property
    def operation(self) -> str:
        """ "matvec" or "dequantise"."""
        uses_x = any(spec.split(":")[0] == "x" for step in self.steps for spec in step.args)
        return "matvec" if uses_x else "dequantise"

    def arguments(self, step: PlannedLaunch) -> dict[str, Any]:
        """Name → value for `Machine.launch`, from the specifications."""
        out: dict[str, Any] = {}
        for number, spec in enumerate(step.args):
            name, value = self._argument(spec.strip())
            out[name if name not in out else f"{name} ({number})"] = value
        return out

    def _argument(self, spec: str) -> tuple[str, Any]:
        if "=" in spec:
            name, _, text = spec.partition("=")
            try:
                return name, evaluate(text, self.sizes)
            except UsageError:
                if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text.strip()):
                    raise
                return name, float(text)
        name, _, kind = spec.partition(":")
        if spec in self.sizes:
            return spec, self.sizes[spec]
        if spec in self._buffers:
            return name, self._buffers[spec]
        if name == "weights" and not kind:
            return name, self.raw
        if name == "null" and not kind:
            return name, 0
        if name == "x":
            kind = kind or "f32"
            if kind not in _ACTIVATIONS:
                raise UsageError(f"activations as {kind!r}; known: {', '.join(_ACTIVATIONS)}", code="ptx.argument-unknown")
            self._activation = kind
            return name, self._buffers.setdefault(f"x:{kind}", activations(self.x, kind)[0])
        if name == "out":
            kind = kind or "f32"
            if kind not in _OUTPUTS:
                raise UsageError(f"output as {kind!r}; known: {', '.join(_OUTPUTS)}", code="ptx.argument-unknown")
            shape = (self.rows,) if self.operation == "matvec" else (self.rows, self.cols)
            self.out = np.full(shape, np.nan, np.float32 if kind == "f32" else np.float16)
            pointer = Pointer(self.out, name="out", initialised=False)
            self._buffers["out"] = self._buffers[spec] = pointer
            return name, pointer
        if kind:
            nbytes = max(evaluate(kind, self.sizes), 1)
            if nbytes > MOST_BUFFER:
                raise UsageError(f"a buffer of {nbytes} bytes; at most {MOST_BUFFER}", code="ptx.buffer-size")
            self._buffers[name] = np.zeros(nbytes, np.uint8)
            return name, self._buffers[name]
        raise UsageError(
            f"unknown argument {spec!r}: weights, x, out, null, NAME:BYTES, NAME=NUMBER, or one of {', '.join(self.sizes)}",
            code="ptx.argument-unknown",
        )

    def extents(self, text: str) -> tuple[int, ...]:
        return tuple(evaluate(part, self.sizes) for part in text.split(","))

    def launch(self, **options: Any) -> LaunchReport:
        """Run all steps; `options` go to the last one."""
        self._buffers.clear()
        report: LaunchReport | None = None
        for step in self.steps:
            last = step is self.steps[-1]
            report = self.machine.launch(
                step.entry,
                self.extents(step.grid),
                self.extents(step.block),
                self.arguments(step),
                shared=step.shared,
                **(options if last else {}),
            )
        assert report is not None
        return report

    def compare(self) -> KernelComparison:
        """The last output next to the right one."""
        if self.out is None:
            raise UsageError("launch first", code="ptx.not-launched")
        weights = self.tensor.dequantise(slice(0, self.rows))
        if self.operation == "dequantise":
            return compare_exactly(self.out, weights.reshape(self.out.shape))
        x = activations(self.x, self._activation)[1]
        return compare_product(self.out, weights, x)


def run(job: Job, *, checks: bool = False, counters: bool = False) -> KernelRun:
    """Launch and compare."""
    report = job.launch(checks=checks, counters=counters)
    comparison = job.compare()
    assert job.out is not None
    return KernelRun(report, job.out, comparison)


def profile(job: Job) -> KernelRun:
    """Launch with counters and compare."""
    return run(job, counters=True)


def check(job: Job) -> KernelRun:
    """Launch with checks and compare; a kernel stopped by its first fault still gives a report."""
    return run(job, checks=True)


def step(job: Job, *, block_number: int = 0, warp: int = 0, checks: bool = False) -> Stepper:
    """A stepper on the job's last launch; the launches before it have run."""
    job._buffers.clear()
    for each in job.steps[:-1]:
        job.machine.launch(each.entry, job.extents(each.grid), job.extents(each.block), job.arguments(each), shared=each.shared)
    last = job.steps[-1]
    return Stepper(
        job.machine, last.entry, job.extents(last.grid), job.extents(last.block), job.arguments(last),
        block_number=block_number, warp=warp, shared=last.shared, checks=checks,
    )  # fmt: skip


# ---- the right answers ----------------------------------------


def activations(x: np.ndarray[Any, Any], kind: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(what the kernel gets, the float64 values that it means): rounding x is not the kernel's mistake."""
    if kind == "f32":
        return x.copy(), x.astype(np.float64)
    if kind == "f16":
        half = x.astype(np.float16)
        return half, half.astype(np.float64)
    if x.size % 32:
        raise UsageError(f"{kind} activations need a multiple of 32 columns, not {x.size}", code="ptx.activation-columns")
    groups = x.reshape(-1, 32)
    d = np.abs(groups).max(axis=1) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    quants = np.rint(groups * inverse[:, None]).astype(np.int8)
    scale = d.astype(np.float16)
    parts = [scale[:, None].view(np.uint8).reshape(-1, 2)]
    if kind == "q8_1":  # ggml's: d, then d times the sum of the quants, both float16
        total = (d * quants.sum(axis=1, dtype=np.float32)).astype(np.float16)
        parts.append(total[:, None].view(np.uint8).reshape(-1, 2))
    raw = np.concatenate([*parts, quants.view(np.uint8)], axis=1)
    return raw, (scale.astype(np.float64)[:, None] * quants).reshape(-1)


def compare_exactly(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> KernelComparison:
    """Bit for bit; a float16 output is compared with the rounded values. Which NaN it is does not count."""
    with np.errstate(all="ignore"):
        right = want.astype(got.dtype)
    bits = np.dtype(f"u{got.dtype.itemsize}")
    unwritten = np.isnan(got) & ~np.isnan(right)
    wrong = (got.view(bits) != right.view(bits)) & ~(np.isnan(got) & np.isnan(right))
    return _comparison("dequantise", got, right.astype(np.float64), wrong & ~unwritten, unwritten, np.zeros(got.shape))


def compare_product(got: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> KernelComparison:
    """Against the float64 product. A float32 sum of n terms may differ by (n + 8) 2^-24 times the sum of |w x|, in
    any order.
    """
    wide = weights.astype(np.float64)
    want = wide @ x
    allowed = (len(x) + 8) * 2.0**-24 * (np.abs(wide) @ np.abs(x))
    if got.dtype == np.float16:
        allowed += np.abs(want) * 2.0**-11 + 2.0**-25
    unwritten = np.isnan(got) & ~np.isnan(want)
    with np.errstate(all="ignore"):
        wrong = ~(np.abs(got - want) <= allowed) & ~unwritten
    return _comparison("matvec", got, want, wrong, unwritten, allowed)


def _comparison(operation: str, got: Any, want: Any, wrong: Any, unwritten: Any, allowed: Any) -> KernelComparison:
    with np.errstate(all="ignore"):
        difference = np.abs(got.astype(np.float64) - want)
    ranked = np.where(unwritten, -1.0, np.where(np.isnan(difference), np.where(wrong, np.inf, 0.0), difference))
    if wrong.any():
        ranked = np.where(wrong, ranked + 1e-300, -1.0)
    at = np.unravel_index(int(np.argmax(ranked)), got.shape)
    finite = np.abs(want[np.isfinite(want)])
    return KernelComparison(
        operation, int(got.size), int(np.count_nonzero(wrong)), int(np.count_nonzero(unwritten)), max(float(ranked[at]), 0.0),
        float(finite.max()) if finite.size else 0.0, float(allowed[at]), tuple(int(i) for i in at),
        float(got[at]), float(want[at]),
    )  # fmt: skip


@dataclass(frozen=True)
class EntryInfo:
    """An entry of a PTX file, as `entries` lists it."""

    name: str
    parameters: list[str]
    threads: tuple[int, ...]
    instructions: int
    shared_bytes: int
    unsupported: str = field(default="")


def entries(module: Module) -> list[EntryInfo]:
    """What is in a PTX file, and whether the machine can run it."""
    machine, out = Machine(module), []
    for name in module.entries:
        function = module.functions[name]
        parameters = [f".{p.type} {p.name}" + (f"[{p.count}]" if p.count is not None else "") for p in function.params]
        threads = function.directives.get("reqntid") or function.directives.get("maxntid") or ()
        try:
            program = machine.program(name)
            out.append(EntryInfo(name, parameters, threads, len(program.ops), program.shared_bytes))
        except UnsupportedError as error:
            out.append(EntryInfo(name, parameters, threads, 0, 0, error.message))
    return out


__all__ = [
    "EntryInfo",
    "Job",
    "KernelComparison",
    "KernelFault",
    "KernelRun",
    "PlannedLaunch",
    "check",
    "entries",
    "load",
    "profile",
    "run",
    "step",
]
