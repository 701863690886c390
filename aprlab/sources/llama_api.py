"""llama.cpp's C API by ctypes, as one of two Python packages brings it: nothing is compiled here.

`xllamacpp` (extra `peer`) exports the functions from its extension module. `llama-cpp-python` ships libllama next to its
declarations; it is imported where the library is loaded, which is in the child process alone.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata, util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from aprlab.errors import UnsupportedError, UsageError
from aprlab.sources.llama_layouts import LAYOUTS, Batch, Layout, Parameters, declared, declared_model, layout_of


@dataclass(frozen=True, slots=True)
class Door:
    """A package that llama.cpp is reached through.

    Attributes:
        package: name of the distribution.
        module: what it installs.
        declares: it has ctypes declarations of the structs next to its library.
    """

    package: str
    module: str
    declares: bool

    @property
    def installed(self) -> str | None:
        """Its version; None where it is not installed."""
        spec = util.find_spec(self.module)
        if spec is None or spec.origin is None:  # or a folder that happens to be called so
            return None
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return "of an unknown version"


DOORS = (Door("xllamacpp", "xllamacpp", declares=False), Door("llama-cpp-python", "llama_cpp", declares=True))

Logger = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
Watcher = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


def door(package: str | None = None) -> Door:
    """The package of this name, or the first that is installed; raises UsageError where there is none."""
    found = [one for one in DOORS if package in (None, one.package)]
    for one in found:
        if one.installed:
            return one
    if package is None:
        names = " or ".join(one.package for one in found)
        raise UsageError(f"llama.cpp needs the package {names}: pip install 'aprlab[peer]'", code="source.llama-missing")
    said = f"llama.cpp cannot be reached through {package}, which is not installed: pip install {package}"
    raise UsageError(said, code="source.llama-missing")


@dataclass(frozen=True, slots=True)
class Api:
    """The library of a package, loaded.

    Attributes:
        calls: its functions, typed.
        version: what the library and the package say they are.
        layouts: where llama_context_params may keep its fields.
        switches: where llama_model_params keeps its switches; None where that is not known.
    """

    calls: Any
    version: str
    layouts: tuple[Layout, ...]
    switches: Layout | None = None

    def changed(self, values: Mapping[str, float]) -> Parameters:
        """The default parameters of a context with these fields set, each at its place in a layout that was verified."""
        return self._with(bytes(self.calls.llama_context_default_params().bytes), self.layouts, values)

    def model(self, repack: bool | None) -> Parameters:
        """The parameters that a model is loaded with.

        Args:
            repack: weights go into the layout that the processor's kernels like; None leaves that to llama.cpp.

        Raises:
            UnsupportedError: where llama.cpp's switch for it lies is not known.
        """
        defaults = self.calls.llama_model_default_params()
        if repack is None:
            return Parameters.from_buffer_copy(defaults)
        if self.switches is None:
            said = f"llama.cpp {self.version}: where the switch for repacking lies is not known; llama-cpp-python declares it"
            raise UnsupportedError(said, code="source.llama-unknown")
        return self._with(bytes(defaults.bytes), (self.switches,), {"use_extra_bufts": int(repack)})

    def _with(self, defaults: bytes, layouts: tuple[Layout, ...], values: Mapping[str, float]) -> Parameters:
        layout, out = layout_of(defaults, self.version, layouts), bytearray(defaults)
        for name, value in values.items():
            at, kind, _ = layout[name]
            struct.pack_into(kind, out, at, value)
        return Parameters.from_buffer_copy(bytes(out))


def opened(package: str | None = None) -> Api:
    """Load the library into this process.

    Args:
        package: one of `DOORS`; None for the first that is installed.

    Raises:
        UsageError: it is not installed.
        UnsupportedError: there is no library, a function or a field is missing, or it cannot be loaded.
    """
    found = door(package)
    program = f"{found.package} {found.installed}"
    layouts, switches = LAYOUTS, None
    if found.declares:
        library, layouts, switches = _declaring(found, program)
    else:
        library = _exporting(found)
    calls = _typed(library, program)
    numbers = [_says(calls, name) for name in ("llama_version", "ggml_version")]
    return Api(calls, f"{numbers[0]} (ggml {numbers[1]}, {program})", layouts, switches)


def _exporting(found: Door) -> Any:
    """The extension module itself is the library."""
    folder = Path(_spec(found).origin or "").parent
    binary = next(iter(sorted(folder.glob(f"{found.module}*.so"))), None)
    if binary is None:
        raise UnsupportedError(f"{found.package} has no library that ctypes can open", code="source.llama-unknown")
    return ctypes.CDLL(str(binary))


def _declaring(found: Door, program: str) -> tuple[Any, tuple[Layout, ...], Layout | None]:
    """The library that the package's declarations are bound to, and the layouts that they give.

    The package's own `__init__` is not run: it imports a whole client, and what that needs.
    """
    sys.modules.setdefault(found.module, util.module_from_spec(_spec(found)))
    try:
        module = import_module(f"{found.module}.{found.module}")
        path = module._lib._name
    except Exception as error:  # whatever somebody else's module raises
        why = str(error).strip().split("\n")[0]
        raise UnsupportedError(f"{program} does not load its library: {why}", code="source.llama-unknown") from error
    return ctypes.CDLL(path), (declared(module, program),), declared_model(module)


def _spec(found: Door) -> ModuleSpec:
    spec = util.find_spec(found.module)
    assert spec is not None, "a door that `door` gave is installed"
    return spec


def _typed(lib: Any, program: str) -> Any:
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", Parameters, []), ("llama_context_default_params", Parameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Parameters]), ("llama_model_free", None, [pointer]),
        ("llama_init_from_model", pointer, [pointer, Parameters]), ("llama_free", None, [pointer]),
        ("llama_batch_get_one", Batch, [pointer, number]), ("llama_decode", number, [pointer, Batch]),
        ("llama_model_get_vocab", pointer, [pointer]), ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_tokenize", number, [pointer, ctypes.c_char_p, number, pointer, number, ctypes.c_bool, ctypes.c_bool]),
        ("llama_log_set", None, [Logger, pointer]),
        ("ggml_get_name", ctypes.c_char_p, [pointer]), ("ggml_op_desc", ctypes.c_char_p, [pointer]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]), ("ggml_is_contiguous", ctypes.c_bool, [pointer]),
        ("ggml_type_name", ctypes.c_char_p, [number]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
        ("ggml_backend_tensor_set", None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
    ):  # fmt: skip
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise UnsupportedError(f"{program} exports no {name}", code="source.llama-unknown") from None
        function.restype, function.argtypes = result, arguments
    return lib


def _says(lib: Any, name: str) -> str:
    """A version as a function of the library gives it; libraries before these functions state none."""
    try:
        function = getattr(lib, name)
    except AttributeError:
        return "?"
    function.restype, function.argtypes = ctypes.c_char_p, []
    return str(function().decode())


def address(function: Callable[..., Any]) -> int:
    """Where a ctypes callback lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
