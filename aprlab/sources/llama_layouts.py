"""Where llama.cpp's structs keep their fields: from a table, or read from the declarations of a Python package.

Parameter structs are passed by value and move between versions. So they are opaque buffers here, and a layout is believed only
if every default that is known is found where it says.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from typing import Any

from aprlab.errors import UnsupportedError

SIZE = 512  # bytes passed for a struct of parameters; any version is smaller
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
        "abort_callback_data": (120, "<Q", 0), "embeddings": (136, "<B", 0), "offload_kqv": (137, "<B", 1),
        "no_perf": (138, "<B", 1), "op_offload": (139, "<B", 1),
    },
)  # fmt: skip
MODEL = {"vocab_only": 0, "check_tensors": 0, "use_extra_bufts": 1}  # switches of llama_model_params, by default
CHANGED = ("n_ctx", "n_threads", "n_threads_batch", "flash_attn_type", "cb_eval", "type_k", "type_v")  # what a run sets


class Parameters(ctypes.Structure):
    """A struct of parameters, whatever is in it."""

    _fields_ = (("bytes", ctypes.c_uint8 * SIZE),)


class Batch(ctypes.Structure):
    """llama_batch: the token ids, and of which of them logits are asked."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p), ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p), ("logits", ctypes.c_void_p),
    )  # fmt: skip


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


def declared(module: Any, program: str) -> Layout:
    """llama_context_params as a module of ctypes declarations has it, with the defaults that are known.

    Args:
        module: has ``llama_context_params`` and ``llama_batch``, subclasses of `ctypes.Structure`.
        program: what it belongs to, for the message.

    Raises:
        UnsupportedError: a struct or a field that a run sets is not declared, or llama_batch is another.
    """
    found: dict[str, type[ctypes.Structure]] = {}
    for name in ("llama_context_params", "llama_batch"):
        kind = getattr(module, name, None)
        if not isinstance(kind, type) or not issubclass(kind, ctypes.Structure):
            raise UnsupportedError(f"{program} declares no struct {name}", code="source.llama-unknown")
        found[name] = kind
    if _places(found["llama_batch"]) != _places(Batch):
        raise UnsupportedError(f"{program} declares another llama_batch than is known here", code="source.llama-unknown")
    places = _places(found["llama_context_params"])
    for name in CHANGED:
        if name not in places:
            raise UnsupportedError(f"{program} declares no {name} in llama_context_params", code="source.llama-unknown")
    beyond = [name for name, (at, size) in places.items() if at + size > SIZE]
    if beyond:
        raise UnsupportedError(f"{program} declares {beyond[0]} beyond {SIZE} bytes", code="source.llama-unknown")
    known = LAYOUTS[0]
    for name in (name for name in known if name in places):
        if places[name][1] != struct.calcsize(known[name][1]):
            said = f"{program} declares {name} in {places[name][1]} bytes, not {struct.calcsize(known[name][1])}"
            raise UnsupportedError(said, code="source.llama-unknown")
    return {name: (places[name][0], kind, default) for name, (_, kind, default) in known.items() if name in places}


def declared_model(module: Any) -> Layout | None:
    """The switches of llama_model_params as a module of ctypes declarations has them; None where they are not declared so."""
    kind = getattr(module, "llama_model_params", None)
    if not isinstance(kind, type) or not issubclass(kind, ctypes.Structure):
        return None
    places = _places(kind)
    if any(places.get(name, (SIZE, 0))[1] != 1 or places[name][0] >= SIZE for name in MODEL):
        return None
    return {name: (places[name][0], "<B", default) for name, default in MODEL.items()}


def _places(kind: type[ctypes.Structure]) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of each field."""
    fields = ((entry[0], getattr(kind, entry[0])) for entry in kind._fields_)
    return {name: (field.offset, field.size) for name, field in fields}
