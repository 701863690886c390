"""Kernels that ship as LLVM modules: the first start on a machine only has code generated, it compiles nothing.

numba needs a second or two for a kernel, most of it to get from Python to optimised LLVM code, which is the same on every
machine with one instruction set. So that code ships as text, one archive an instruction set, made by
`docs/make/kernel_modules.py` from the kernels' sources; what is left for the user's machine, machine code for its very
processor, takes a tenth of a second.

An archive is used only where it fits: made from these sources, with this release of numba, for this platform. Anything else is
compiled as if there were no archive. A module is what numba had after its last optimisation; next to it are numba's own
descriptions of the function (names, environment, signature), as its cache on disk keeps them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from aprlab.kernels.simd import isa as isas

FOLDER = Path(__file__).parent / "modules"
SHIPPED = (isas.AVX512, isas.AVX2)  # `portable` is for processors that the archives' platform no longer has


@dataclass(frozen=True, slots=True)
class KernelModule:
    """One kernel for one signature: its code as LLVM's text, and the rest of what numba's `CompileResult` is rebuilt from."""

    name: str
    text: str
    rest: bytes


@dataclass(frozen=True, slots=True)
class KernelArchive:
    """The modules of one instruction set by `key`, and what they were made with (`fits`)."""

    made_with: dict[str, Any]
    modules: dict[str, KernelModule]


def key(function: Callable[..., Any], sig: Any) -> str:
    """What a kernel for a signature, numba's types, is called in an archive."""
    return f"{function.__module__}.{function.__qualname__}{sig}"


def made_with(codegen: Any) -> dict[str, Any]:
    """All that a module depends on, apart from its key: sources, releases, platform, the layout of Python's objects."""
    import llvmlite
    import numba
    from numba import _dynfunc

    return {
        "sources": isas.source_digest(),
        "numba": release(numba.__version__),
        "llvmlite": release(llvmlite.__version__),
        "triple": codegen._llvm_module.triple,
        "layout": str(codegen.target_data),
        "objects": dict(_dynfunc._impl_info),
    }


def release(version: str) -> str:
    """``0.68.1`` -> ``0.68``: within one of these numba changes none of its inner interfaces."""
    return ".".join(version.split(".")[:2])


def path(isa: isas.Isa) -> Path:
    """Where the archive of an instruction set is."""
    return FOLDER / f"{isa.name}.zst"


def read(isa: isas.Isa) -> KernelArchive:
    """The archive of an instruction set; raises OSError where there is none."""
    import zstandard

    made, entries = pickle.loads(zstandard.decompress(path(isa).read_bytes()))
    return KernelArchive(made, {name: KernelModule(*entry) for name, entry in entries.items()})


def write(isa: isas.Isa, archive: KernelArchive) -> None:
    """Put an archive into the package; the same archive gives the same bytes."""
    import zstandard

    entries = {name: (m.name, m.text, m.rest) for name, m in sorted(archive.modules.items())}
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(19, window_log=26, enable_ldm=True)
    )
    FOLDER.mkdir(exist_ok=True)
    path(isa).write_bytes(compressor.compress(pickle.dumps((archive.made_with, entries), protocol=4)))


@cache
def _modules(isa: isas.Isa, codegen: Any) -> dict[str, KernelModule]:
    """The modules that may be used here; empty where they do not fit."""
    if isa not in SHIPPED or not isas.supported(isa):
        return {}
    try:
        archive = read(isa)
    except Exception:  # not there, damaged: then it is compiled
        return {}
    return archive.modules if archive.made_with == made_with(codegen) else {}


def fits(isa: isas.Isa | None = None) -> bool:
    """Whether the archive of an instruction set, None for the best one here, is used on this machine."""
    from numba.core.registry import cpu_target

    return bool(_modules(isa or isas.choose(), cpu_target.target_context.codegen()))


def generate(function: Callable[..., Any], sig: Any, codegen: Any) -> tuple[Any, ...] | None:
    """What `CompileResult._rebuild` takes, with machine code for this processor; None where no module fits.

    Kernels that are not made for an instruction set are taken from the archive of the best one of this machine.
    """
    from llvmlite import binding

    names = {getattr(t, "value", None) for t in sig if getattr(t, "group", "") == "isa"}
    isa = next((i for i in isas.ALL if (i.name in names if names else isas.supported(i))), isas.PORTABLE)
    module = _modules(isa, codegen).get(key(function, sig))
    if module is None:
        return None
    parsed = binding.parse_assembly(module.text)
    parsed.verify()
    code = codegen._tm.emit_object(parsed)
    for each in parsed.functions:  # as numba does, so that other functions could be linked with it
        if not each.is_declaration and each.linkage == binding.Linkage.external:
            each.linkage = "linkonce_odr"
    return (module.name, "object", (code, parsed.as_bitcode())), *pickle.loads(module.rest)
