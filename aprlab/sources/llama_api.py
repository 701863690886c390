"""llama.cpp's C API as the wheel `xllamacpp` (extra `peer`) exports it: by ctypes, nothing is compiled.

Parameter structs are passed by value and move between versions. So they are opaque buffers here, and the few fields that are
set lie where `LAYOUTS` says, which is believed only if every default that it lists is found there.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from aprlab.errors import UnsupportedError, UsageError

SIZE = 512  # bytes passed for a struct of parameters; any version is smaller
PACKAGE = "xllamacpp"
Layout = Mapping[str, tuple[int, str, float]]  # field -> offset, format of `struct`, default

# llama_context_params; fields that are only compared with their default pin the layout down.
LAYOUTS: tuple[Layout, ...] = (
    {  # llama 0.6 (ggml 0.26, October 2026)
        "n_ctx": (0, "<I", 512), "n_batch": (4, "<I", 2048), "n_ubatch": (8, "<I", 512), "n_seq_max": (12, "<I", 1),
        "n_threads": (28, "<i", 4), "n_threads_batch": (32, "<i", 4), "rope_scaling_type": (40, "<i", -1),
        "pooling_type": (44, "<i", -1), "attention_type": (48, "<i", -1), "flash_attn_type": (52, "<i", -1),
        "rope_freq_base": (56, "<f", 0.0), "rope_freq_scale": (60, "<f", 0.0), "yarn_ext_factor": (64, "<f", -1.0),
        "yarn_attn_factor": (68, "<f", -1.0), "yarn_beta_fast": (72, "<f", -1.0), "yarn_beta_slow": (76, "<f", -1.0),
        "defrag_thold": (84, "<f", -1.0), "cb_eval": (88, "<Q", 0), "cb_eval_user_data": (96, "<Q", 0),
        "type_k": (104, "<i", 1), "type_v": (108, "<i", 1), "abort_callback": (112, "<Q", 0),
        "abort_callback_data": (120, "<Q", 0), "flags": (136, "<I", 0x01010100),
    },
)  # fmt: skip

Logger = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
Watcher = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class Parameters(ctypes.Structure):
    """A struct of parameters, whatever is in it."""

    _fields_ = (("bytes", ctypes.c_uint8 * SIZE),)


class Batch(ctypes.Structure):
    """llama_batch: the token ids, and of which of them logits are asked."""

    _fields_ = (
        ("count", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p), ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p), ("logits", ctypes.c_void_p),
    )  # fmt: skip


def installed() -> str | None:
    """Version of the wheel, None where it is not installed."""
    if util.find_spec(PACKAGE) is None:
        return None
    return metadata.version(PACKAGE)


def library_file() -> Path:
    """The wheel's shared library; raises UsageError where the wheel is not installed."""
    spec = util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(f"llama.cpp needs the package {PACKAGE}: pip install 'aprlab[peer]'", code="source.llama-missing")
    binary = next(iter(sorted(Path(spec.origin).parent.glob(f"{PACKAGE}*.so"))), None)
    if binary is None:
        raise UnsupportedError(f"{PACKAGE} has no library that ctypes can open", code="source.llama-unknown")
    return binary


def library() -> Any:
    """The library, its functions typed; raises UnsupportedError where one is not there."""
    lib = ctypes.CDLL(str(library_file()))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", Parameters, []), ("llama_context_default_params", Parameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Parameters]), ("llama_model_free", None, [pointer]),
        ("llama_init_from_model", pointer, [pointer, Parameters]), ("llama_free", None, [pointer]),
        ("llama_batch_get_one", Batch, [pointer, number]), ("llama_decode", number, [pointer, Batch]),
        ("llama_model_get_vocab", pointer, [pointer]), ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_tokenize", number, [pointer, ctypes.c_char_p, number, pointer, number, ctypes.c_bool, ctypes.c_bool]),
        ("llama_log_set", None, [Logger, pointer]), ("llama_version", ctypes.c_char_p, []), ("ggml_version", ctypes.c_char_p, []),
        ("ggml_get_name", ctypes.c_char_p, [pointer]), ("ggml_op_desc", ctypes.c_char_p, [pointer]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]), ("ggml_is_contiguous", ctypes.c_bool, [pointer]),
        ("ggml_type_name", ctypes.c_char_p, [number]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
        ("ggml_backend_tensor_set", None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
    ):  # fmt: skip
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise UnsupportedError(f"{PACKAGE} {installed()} exports no {name}", code="source.llama-unknown") from None
        function.restype, function.argtypes = result, arguments
    return lib


def version(lib: Any) -> str:
    """What the library says it is."""
    return f"{lib.llama_version().decode()} (ggml {lib.ggml_version().decode()}, {PACKAGE} {installed()})"


def layout_of(defaults: bytes, program: str, layouts: tuple[Layout, ...] = LAYOUTS) -> Layout:
    """The layout whose every default is found in `defaults`; raises UnsupportedError naming the version and what differs."""
    wrong = []
    for layout in layouts:
        found = {name: struct.unpack_from(kind, defaults, at)[0] for name, (at, kind, _) in layout.items()}
        wrong = [f"{name} is {found[name]:g}, not {layout[name][2]:g}" for name in layout if found[name] != layout[name][2]]
        if not wrong:
            return layout
    said = f"llama.cpp {program} keeps its parameters in an order that is not known here ({wrong[0] if wrong else 'none known'})"
    raise UnsupportedError(said, code="source.llama-unknown")


def changed(lib: Any, values: Mapping[str, float]) -> Parameters:
    """The default parameters of a context with these fields set, each at its place in a layout that was verified."""
    defaults = bytes(lib.llama_context_default_params().bytes)
    layout, out = layout_of(defaults, version(lib)), bytearray(defaults)
    for name, value in values.items():
        at, kind, _ = layout[name]
        struct.pack_into(kind, out, at, value)
    return Parameters.from_buffer_copy(bytes(out))


def address(function: Callable[..., Any]) -> int:
    """Where a ctypes callback lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
