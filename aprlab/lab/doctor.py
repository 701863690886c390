"""`aprlab doctor`: is this installation sound, and what may it hope for? Each check is data; the CLI prints it."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from aprlab import paths
from aprlab.errors import AprlabError
from aprlab.published import ANSWER, QUESTION


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor: `status` is ``ok``, ``note`` (works, but know this) or ``fail`` (exit status 1)."""

    name: str
    status: str
    detail: str


def checks() -> Iterator[Check]:
    """All checks, cheapest first; the last one lets the embedded model answer."""
    yield python()
    yield from packages()
    yield threading_layer()
    yield instructions()
    yield compiled_kernels()
    yield gpu()
    yield memory()
    yield embedded_model()


def python() -> Check:
    """The interpreter, its platform and the cores it may use."""
    machine = f"{platform.system()} {platform.machine()}, {paths.cores()} cores"
    detail = f"{platform.python_version()} on {machine}, {sys.prefix}"
    return Check("Python", "ok" if sys.version_info >= (3, 11) else "fail", detail)


def packages(distribution: str = "aprlab") -> Iterator[Check]:
    """One check per declared dependency; the ones of an extra are notes when absent, the others failures.

    Versions are compared with the `>=` bounds of the distribution's own metadata, the only kind it uses.
    """
    for requirement in metadata.requires(distribution) or []:
        found = re.match(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9.]+))?\s*(?:;.*extra == ['\"](\w+)['\"])?", requirement)
        assert found is not None, requirement
        name, least, extra = found.groups()
        label = f"{name} (extra {extra})" if extra else name
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(label, "note" if extra else "fail", "not installed")
            continue
        old = least is not None and _numbers(version) < _numbers(least)
        yield Check(label, "fail" if old else "ok", f"{version}, older than {least}" if old else version)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.10.0rc1`` -> (2, 10, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", version).group()))  # type: ignore[union-attr]


def threading_layer() -> Check:
    """Which threading layer numba really picks; `workqueue` costs a tenth of a millisecond a launch."""
    try:
        import numba
        import numpy as np

        @numba.njit(parallel=True)
        def touch(x):  # type: ignore[no-untyped-def]
            for i in numba.prange(x.shape[0]):
                x[i] += 1
            return x

        touch(np.zeros(64))
        layer = numba.threading_layer()
    except Exception as error:  # whatever numba or llvmlite raise: the doctor reports and goes on
        return Check("numba threads", "fail", f"{type(error).__name__}: {error}")
    slow = layer == "workqueue"
    advice = "; slow to launch: install libgomp1 (or the package tbb)" if slow else ""
    return Check("numba threads", "note" if slow else "ok", f"{layer}, {numba.get_num_threads()} threads{advice}")


def instructions() -> Check:
    """Which instruction set the kernels of engine jit use."""
    from aprlab.kernels.simd import isa

    try:
        chosen = isa.choose()
    except (AprlabError, ImportError) as error:
        return Check("instructions", "fail", str(error))
    best = next(each for each in isa.ALL if isa.supported(each))
    why = "the best of this machine" if chosen is best else f"asked for by {isa.ENVIRONMENT}; this machine has {best.name}"
    return Check("instructions", "ok" if chosen is best else "note", f"{chosen.name}, {why}")


def compiled_kernels() -> Check:
    """Whether the kernels' shipped modules are used, and where compiled kernels are kept; those files may go at any time."""
    try:
        from aprlab.kernels.simd import kernel_cache, shipped
    except ImportError as error:
        return Check("kernels", "fail", str(error))
    ready = shipped.fits()
    made = "generated from shipped modules" if ready else "compiled at their first use (no shipped modules for this platform)"
    folder = kernel_cache.folder()
    if folder is None:
        return Check("kernels", "note", f"{made}, in every process: no folder can be written")
    files = list(folder.glob("*.nbc"))
    size = sum(file.stat().st_size for file in files)
    return Check("kernels", "ok" if ready else "note", f"{made}; {len(files)} kept in {folder}/*.nbc, {size / 1e6:.1f} MB")


def gpu() -> Check:
    """The GPU, or why none can be used. Nothing in the main job needs one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Check("GPU", "note", "none: no NVIDIA driver (libcuda.so.1 is not found)")
    status = driver.cuInit(0)
    count = ctypes.c_int(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        return Check("GPU", "note", f"none: the NVIDIA driver finds no device (CUDA error {status})")
    try:
        import cupy
    except ImportError:
        return Check("GPU", "note", f"{count.value} found, but CuPy is not installed: pip install 'aprlab[cuda12]'")
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        free, total = cupy.cuda.runtime.memGetInfo()
    except Exception as error:
        return Check("GPU", "fail", f"{count.value} found, but CuPy cannot use it: {error}")
    capability = f"sm_{properties['major']}{properties['minor']}"
    return Check("GPU", "ok", f"{properties['name'].decode()}, {capability}, {free >> 20} of {total >> 20} MiB free")


def memory() -> Check:
    """Free memory: the machine's, or what is left under the container's limit if that is less."""
    try:
        import psutil
    except ImportError as error:
        return Check("memory", "fail", str(error))
    free = psutil.virtual_memory().available
    limit = _cgroup_left()
    where = "free" if limit is None or limit >= free else "left under the container's limit"
    free = free if limit is None else min(free, limit)
    enough = free >= 2 << 30
    return Check(
        "memory", "ok" if enough else "note", f"{free / 2**30:.1f} GiB {where}{'' if enough else ': little for a real model'}"
    )


def _cgroup_left(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the memory limit of cgroup v2, None where there is no limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def embedded_model() -> Check:
    """Open the embedded model, hold it against a whole Qwen2 inventory and let it answer `QUESTION`."""
    try:
        from aprlab.formats import open_model
        from aprlab.inference.session import generate
        from aprlab.model.description import describe

        with open_model(paths.embedded_model()) as model:
            seen = describe(model)
            line = model.load_line()
            answer = generate(model, QUESTION, max_tokens=16).text.strip()
    except (AprlabError, ImportError) as error:
        return Check("embedded model", "fail", str(error))
    if seen["missing"] or seen["unexpected"]:
        return Check("embedded model", "fail", f"missing {seen['missing']}, unexpected {seen['unexpected']}")
    return Check("embedded model", "ok" if answer == ANSWER else "fail", f"{line}; {QUESTION} {answer!r}")
