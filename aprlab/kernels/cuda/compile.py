"""CUDA source to PTX and machine code, by NVRTC. Needs NVIDIA's compiler library, no GPU and no driver.

NVRTC is looked for in the wheels that carry it (`nvidia-cuda-nvrtc-cu12`, its successors) and then on the loader's path. The
program name is fixed, so that the same source gives the same text everywhere.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from aprlab.errors import AprlabError, UnsupportedError

HERE = Path(__file__).parent
MODULES = ("dequantise", "matvec", "matvec_q8", "qwen2")
"""The kernel files, without ``.cu``."""
PRELUDE = "prelude.cuh"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, that the kernels are compiled for in the tests."""
SHIPPED = 80
"""The one whose PTX text is part of the package."""
OPTIONS = ("--std=c++17", "-lineinfo")

_INCLUDE = re.compile(r'^#include "(prelude\.cuh|blocks\.cuh)"$', re.MULTILINE)


class CompileError(AprlabError):
    """NVRTC refused the source; the message is its log."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel takes, as the assembler reports it (``ptxas -v``). Bytes, but for `registers`."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """One module for one architecture: PTX text, machine code, and resources by kernel name."""

    ptx: str
    cubin: bytes
    resources: Mapping[str, Resources]


def texts() -> dict[str, str]:
    """Every source file by name: the kernel files and what they include."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.cu*"))}


def source(module: str, files: Mapping[str, str] | None = None) -> str:
    """One self-contained text of `module`: includes put in place, with `#line` marks, so that line numbers stay true.

    `files` replaces the shipped files (by file name); this is where a mutation comes in.
    """
    if module not in MODULES:
        raise UnsupportedError(f"unknown kernel module {module!r}; known: {', '.join(MODULES)}", code="cuda.unknown-module")
    files = texts() if files is None else files
    return _expand(f"{module}.cu", files)


def _expand(name: str, files: Mapping[str, str]) -> str:
    text, out, end = files[name], [f'#line 1 "{name}"\n'], 0
    for include in _INCLUDE.finditer(text):
        line = text.count("\n", 0, include.start()) + 1
        out += [text[end : include.start()], _expand(include[1], files), f'\n#line {line + 1} "{name}"']
        end = include.end()
    return "".join([*out, text[end:]])


def shipped_ptx(module: str) -> str:
    """The PTX text that came with the package, for compute capability `SHIPPED`."""
    if module not in MODULES:
        raise UnsupportedError(f"unknown kernel module {module!r}; known: {', '.join(MODULES)}", code="cuda.unknown-module")
    return (HERE / "ptx" / f"{module}.ptx").read_text(encoding="utf-8")


def one_entry(text: str, entry: str) -> str:
    """NVRTC's PTX `text` with one kernel only: much shorter, means the same. Raises UnsupportedError if it is not in there."""
    start = text.find(f".visible .entry {entry}(")
    if start < 0:
        raise UnsupportedError(f"this PTX has no kernel {entry!r}", code="cuda.no-such-kernel")
    head, end = text.index(".visible .entry "), text.index("\n}\n", start) + 3
    files = text.find("\t.file\t")  # source names and debug strings follow all kernels
    return text[:head] + text[start:end] + (text[files:] if files >= 0 else "")


def compile_source(
    text: str, arch: int = SHIPPED, *, machine_code: bool = False, options: tuple[str, ...] = ()
) -> Compiled:
    """Compile a self-contained CUDA text.

    Args:
        text: CUDA C++.
        arch: compute capability times ten.
        machine_code: also assemble it, which fills `cubin` and `resources`; else both are empty.
        options: NVRTC's, in addition to `OPTIONS`.

    Raises:
        CompileError: NVRTC refused the text.
        UnsupportedError: there is no NVRTC on this machine.
    """
    target, extra = (f"sm_{arch}", ("--ptxas-options=-v",)) if machine_code else (f"compute_{arch}", ())
    found, cubin, log = _run(text, target, *extra, *options)
    return Compiled(found, cubin, parse_log(log) if machine_code else {})


def ptx(module: str, files: Mapping[str, str] | None = None, arch: int = SHIPPED) -> str:
    """Freshly compiled PTX of one kernel file."""
    return compile_source(source(module, files), arch).ptx


def write_shipped() -> None:
    """Compile all kernel files again into the package's `ptx` folder: ``python -m aprlab.kernels.cuda.compile``."""
    for module in MODULES:
        (HERE / "ptx" / f"{module}.ptx").write_text(ptx(module), encoding="utf-8")


# `.file` names the working directory, which is private and would make the text depend on it
_FILE = re.compile(r'(\.file\s+\d+ )"(?:[^"]*/)?([^"/]+)"')
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_log(log: str) -> dict[str, Resources]:
    """Resources by kernel out of the assembler's log. Raises AprlabError where a kernel's lines are incomplete."""
    found: dict[str, Resources] = {}
    parts = _ENTRY.split(log)
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        stack, used, shared = _STACK.search(part), _USED.search(part), _SHARED.search(part)
        if stack is None or used is None:
            raise AprlabError(f"the assembler's log says nothing about kernel {name}", code="cuda.incomplete-log")
        found[name] = Resources(
            int(used[1]), int(stack[1]), int(stack[2]), int(stack[3]), int(shared[1]) if shared else 0
        )
    return found


# ---- NVRTC -------------------------------------------------------------------------------------------------------


@cache
def nvrtc() -> ctypes.CDLL:
    """The compiler library. Raises UnsupportedError where there is none."""
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise UnsupportedError(
        "no NVRTC on this machine: install the wheel nvidia-cuda-nvrtc-cu12 (or a CUDA toolkit)", code="cuda.no-nvrtc"
    )


def available() -> bool:
    """Whether kernels can be compiled here."""
    try:
        nvrtc()
    except UnsupportedError:
        return False
    return True


def _candidates() -> Iterator[str]:
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = [path for path in Path(folder).glob("*/lib/libnvrtc.so*") if ".alt." not in path.name]
        yield from map(str, sorted(found))
    located = ctypes.util.find_library("nvrtc")
    if located:
        yield located


def version() -> tuple[int, int]:
    """NVRTC's own version, e.g. (12, 9)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def architectures() -> tuple[int, ...]:
    """Those of `ARCHITECTURES` that this machine's NVRTC knows."""
    lib, count = nvrtc(), ctypes.c_int()
    lib.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    lib.nvrtcGetSupportedArchs(numbers)
    return tuple(arch for arch in ARCHITECTURES if arch in set(numbers))


def _run(text: str, target: str, *options: str) -> tuple[str, bytes, str]:
    """(PTX text, machine code, log); there is machine code for ``sm_…`` only, the text is that of ``compute_…`` either way."""
    lib, program = nvrtc(), ctypes.c_void_p()
    flags = [f"--gpu-architecture={target}", *OPTIONS, *options]
    lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"aprlab.cu", 0, None, None)
    try:
        status = lib.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*map(str.encode, flags)))
        log = _take(lib, program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise CompileError(f"NVRTC for {target}:\n{log}", code="cuda.compile-failed")
        found = _FILE.sub(r'\1"\2"', _take(lib, program, "PTX").rstrip(b"\0").decode())
        return found, _take(lib, program, "CUBIN") if target.startswith("sm_") else b"", log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _take(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


if __name__ == "__main__":
    write_shipped()
