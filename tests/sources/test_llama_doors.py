"""The two packages that llama.cpp is reached through: which is taken, and where the structs keep their fields."""

from __future__ import annotations

import ctypes
import struct
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aprlab.cli.app import run_cli
from aprlab.errors import UnsupportedError, UsageError
from aprlab.sources import llama_api, source
from aprlab.sources.llama_api import Api, Door
from aprlab.sources.llama_layouts import CHANGED, LAYOUTS, SIZE, Batch, Layout, Parameters, declared, declared_model, layout_of

U, N, F, P, B = ctypes.c_uint32, ctypes.c_int, ctypes.c_float, ctypes.c_void_p, ctypes.c_bool
CALLBACK = ctypes.CFUNCTYPE(B, P, B, P)
# As llama-cpp-python 0.3.36 declares llama_context_params.
FIELDS: list[tuple[str, Any]] = [
    *((name, U) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
    *((name, N) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type", "attention_type")),
    ("flash_attn_type", N), ("rope_freq_base", F), ("rope_freq_scale", F), ("yarn_ext_factor", F), ("yarn_attn_factor", F),
    ("yarn_beta_fast", F), ("yarn_beta_slow", F), ("yarn_orig_ctx", U), ("defrag_thold", F), ("cb_eval", CALLBACK),
    ("cb_eval_user_data", P), ("type_k", N), ("type_v", N), ("abort_callback", CALLBACK), ("abort_callback_data", P),
    *((name, B) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
    ("samplers", P), ("n_samplers", ctypes.c_size_t), ("ctx_other", P),
]  # fmt: skip
BATCH = [
    ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.POINTER(F)),
    ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", P), ("seq_id", P), ("logits", ctypes.POINTER(ctypes.c_int8)),
]  # fmt: skip


def _struct(fields: list[tuple[str, Any]]) -> type[ctypes.Structure]:
    return type("llama_struct", (ctypes.Structure,), {"_fields_": fields})


def _module(fields: list[tuple[str, Any]] = FIELDS, batch: list[tuple[str, Any]] = BATCH) -> Any:
    return SimpleNamespace(llama_context_params=_struct(fields), llama_batch=_struct(batch))


def _defaults(layout: Layout = LAYOUTS[0]) -> bytearray:
    made = bytearray(SIZE)
    for at, kind, value in layout.values():
        struct.pack_into(kind, made, at, value)
    return made


def test_a_layout_is_believed_only_if_every_default_is_found() -> None:
    assert layout_of(bytes(_defaults()), "1.0") is LAYOUTS[0]
    for name, (at, kind, value) in LAYOUTS[0].items():
        other = _defaults()
        struct.pack_into(kind, other, at, value + 3)
        with pytest.raises(UnsupportedError) as caught:
            layout_of(bytes(other), "9.9")
        assert caught.value.code == "source.llama-unknown"
        assert "9.9" in str(caught.value) and name in str(caught.value)


def test_places_are_read_from_declarations() -> None:
    """The wheel's newer version, which the table has, keeps one pointer more before the switches."""
    at = [name for name, _ in FIELDS].index("embeddings")
    assert declared(_module([*FIELDS[:at], ("one_more", P), *FIELDS[at:]]), "x") == LAYOUTS[0]
    switches = ("embeddings", "offload_kqv", "no_perf", "op_offload")
    moved = {name: (128 + i, *LAYOUTS[0][name][1:]) for i, name in enumerate(switches)}
    assert declared(_module(), "x") == {**LAYOUTS[0], **moved}


def test_fields_that_moved_are_read_and_written_where_they_are_declared() -> None:
    layout = declared(_module([*FIELDS[:4], ("n_new", U), ("n_newer", ctypes.c_uint64), *FIELDS[4:]]), "x")
    assert layout["n_batch"][0] == 4
    assert layout["type_k"][0] == LAYOUTS[0]["type_k"][0] + 16
    there, elsewhere = (SimpleNamespace(llama_context_default_params=lambda made=made: Parameters.from_buffer_copy(made))
                        for made in (_defaults(layout), _defaults()))  # fmt: skip
    given = bytes(Api(there, "x", (layout,)).changed({"type_k": 0, "n_ctx": 256}).bytes)
    assert struct.unpack_from("<i", given, layout["type_k"][0]) == (0,)
    assert struct.unpack_from("<I", given) == (256,)
    with pytest.raises(UnsupportedError, match=r"package 9\.9"):  # declared so, and the library does otherwise
        Api(elsewhere, "package 9.9", (layout,)).changed({})


@pytest.mark.parametrize("name", CHANGED)
def test_declarations_without_a_field_that_a_run_sets_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"package 9\.9 declares no {name}\b") as caught:
        declared(_module([entry for entry in FIELDS if entry[0] != name]), "package 9.9")
    assert caught.value.code == "source.llama-unknown"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (SimpleNamespace(llama_batch=Batch), "no struct llama_context_params"),
        (SimpleNamespace(llama_context_params=_struct(FIELDS), llama_batch=7), "no struct llama_batch"),
        (_module(batch=[*BATCH[:2], ("other", P), *BATCH[2:]]), "another llama_batch"),
        (_module([("n_ctx", ctypes.c_uint64), *FIELDS[1:]]), "n_ctx in 8 bytes, not 4"),
        (_module([*FIELDS, ("much", ctypes.c_uint8 * SIZE)]), "much beyond 512 bytes"),
    ],
)  # fmt: skip
def test_other_declarations_are_refused(module: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said) as caught:
        declared(module, "package 9.9")
    assert caught.value.code == "source.llama-unknown"


def test_the_switch_for_repacking_is_set_where_it_is_declared() -> None:
    fields = [("n_gpu_layers", N), ("vocab_only", B), ("check_tensors", B), ("use_extra_bufts", B), ("no_host", B)]
    switches = declared_model(SimpleNamespace(llama_model_params=_struct(fields)))
    assert switches is not None
    made = _defaults(switches)
    calls = SimpleNamespace(llama_model_default_params=lambda: Parameters.from_buffer_copy(made))
    api = Api(calls, "package 9.9", LAYOUTS, switches)
    assert bytes(api.model(None).bytes) == made
    assert bytes(api.model(repack=False).bytes) == bytes(SIZE)
    made[4] = 1  # vocab_only, or what lies there
    with pytest.raises(UnsupportedError, match="vocab_only is 1"):
        api.model(repack=False)


@pytest.mark.parametrize(
    "fields", [None, [("use_extra_bufts", B)], [("vocab_only", N), ("check_tensors", B), ("use_extra_bufts", B)]]
)
def test_a_switch_whose_place_is_not_known_is_refused(fields: list[tuple[str, Any]] | None) -> None:
    switches = declared_model(SimpleNamespace(llama_model_params=None if fields is None else _struct(fields)))
    calls = SimpleNamespace(llama_model_default_params=Parameters)
    with pytest.raises(UnsupportedError, match=r"package 9\.9.*repacking") as caught:
        Api(calls, "package 9.9", LAYOUTS, switches).model(repack=False)
    assert caught.value.code == "source.llama-unknown"


def test_the_first_package_that_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    doors = [Door(f"package-{name}", name, declares=False) for name in ("no_such_wheel", "pytest", "numpy")]
    monkeypatch.setattr(llama_api, "DOORS", tuple(doors))
    assert llama_api.door() is doors[1]
    assert llama_api.door("package-numpy") is doors[2]
    with pytest.raises(UsageError, match="package-no_such_wheel") as caught:
        llama_api.door("package-no_such_wheel")
    assert caught.value.code == "source.llama-missing"


def test_without_a_package_both_are_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_api, "DOORS", tuple(Door(one.package, "no_such_wheel", one.declares) for one in llama_api.DOORS))
    with pytest.raises(UsageError, match=r"llama-cpp-python: pip install 'aprlab\[peer\]'") as caught:
        source("llama.cpp", tiny)
    assert caught.value.code == "source.llama-missing"


def test_asked_by_name_and_not_installed_is_one_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if util.find_spec("llama_cpp") is not None:
        pytest.skip("llama-cpp-python is installed")
    assert run_cli(["peel", str(tiny), "--source", "llama-cpp-python"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install llama-cpp-python" in line


@pytest.mark.parametrize(
    ("binding", "said"),
    [
        ("_lib = ctypes.CDLL(None)", "declares no struct llama_context_params"),
        ("_lib = ctypes.CDLL('/no/such.so')", "does not load its library"),
     ("", "does not load its library")],
)  # fmt: skip
def test_the_package_itself_is_not_run_and_its_library_is_refused_by_name(
    binding: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "strange_llama"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('the whole client is imported')\n")
    (folder / "strange_llama.py").write_text(f"import ctypes\n{binding}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(llama_api, "DOORS", (Door("strange", "strange_llama", declares=True),))
    try:
        with pytest.raises(UnsupportedError, match=rf"strange of an unknown version {said}") as caught:
            llama_api.opened()
        assert "\n" not in str(caught.value)
    finally:
        for name in ("strange_llama", "strange_llama.strange_llama"):
            sys.modules.pop(name, None)
