"""llama.cpp as a source: all points, prompt and decode, injection; a crash and an unknown version are one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import CONFIG
from made import made_model, write_gguf
from peer import f32_copy

import aprlab
from aprlab.architectures import points
from aprlab.errors import NumericError, UnsupportedError, UsageError
from aprlab.model.config import ModelConfig
from aprlab.onion.foreign_shadow import Judges, shadow_of
from aprlab.sources import llama_api, llama_cpp, source
from aprlab.sources.llama_nodes import Nodes
from aprlab.tracing.comparisons import difference
from aprlab.tracing.traces import Point

TOKENS = [5, 9, 30, 77, 41, 8, 200]
EDITS = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in F32: nothing is rounded."""
    return f32_copy(tiny, tmp_path_factory.mktemp("f32"))


@pytest.fixture(scope="module", params=[one.package for one in llama_api.DOORS])
def package(request: pytest.FixtureRequest) -> str:
    """Each package that llama.cpp is reached through, where it is installed."""
    found: str = request.param
    if not next(one for one in llama_api.DOORS if one.package == found).installed:
        pytest.skip(f"{found} is not installed")
    return found


@pytest.fixture(scope="module")
def llama(plain: Path, package: str) -> Iterator[llama_cpp.LlamaSource]:
    with llama_cpp.LlamaSource(plain, cache="f32", package=package) as found:
        yield found


@pytest.mark.peer
@pytest.mark.parametrize("prompt", [None, 4, 1])
def test_every_point_agrees_with_the_reference_where_nothing_is_rounded(
    llama: llama_cpp.LlamaSource, plain: Path, prompt: int | None
) -> None:
    ours = source("reference", plain).run(TOKENS, prompt=prompt)
    theirs = llama.run(TOKENS, prompt=prompt)
    assert str(llama.contract) == theirs.contract == "f32"
    assert list(theirs) == list(points(llama.config))
    for name in ours:
        assert difference(ours[name].values, theirs[name].values).rel_l2 < 2e-5, name


@pytest.mark.peer
def test_what_is_injected_into_llama_goes_on(llama: llama_cpp.LlamaSource) -> None:
    healthy = llama.run(TOKENS, prompt=5)
    at = np.array([2, 6])
    zero = Point("layers.1.down", np.zeros_like(healthy["layers.1.down"].values[at]), at, "x", "f32")
    found = llama.run(TOKENS, prompt=5, inject={"layers.1.down": zero})
    assert np.array_equal(found["layers.1.out"].values[at], found["layers.1.ffn_inp"].values[at])
    assert np.array_equal(found["layers.1.out"].values[[0, 1, 3]], healthy["layers.1.out"].values[[0, 1, 3]])
    assert not np.array_equal(found["logits"].values[6], healthy["logits"].values[6])


@pytest.mark.peer
@pytest.mark.parametrize("spec", ["llama.cpp", "llama.cpp,flash=on", "llama.cpp,cache=f32,flash=on"])
def test_the_contract_says_what_is_rounded(tiny: Path, spec: str) -> None:
    pytest.importorskip("xllamacpp")
    with source(spec, tiny) as found:
        assert str(found.contract) == ("q8, cache f16, flash" if "flash" in spec else "q8, cache f16")
        healthy = aprlab.trace(aprlab.open_model(tiny), TOKENS, "logits")["logits"].values
        assert difference(healthy, found.run(TOKENS, "logits")["logits"].values).rel_l2 < 0.05


@pytest.mark.peer
def test_a_crash_of_llama_is_one_line_of_ours(tiny: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([EDITS, os.environ.get("PYTHONPATH", "")]))
    repack = False if package == llama_cpp.PYTHON else None  # so that nothing else crashes
    with llama_cpp.LlamaSource(tiny, package=package, repack=repack, edit=("misbehaviour:crash", {})) as found:
        with pytest.raises(NumericError) as caught:
            found.run(TOKENS)
        assert caught.value.code == "source.llama-crashed"
        assert "\n" not in str(caught.value)


@pytest.mark.peer
def test_an_edit_changes_what_comes_after_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([EDITS, os.environ.get("PYTHONPATH", "")]))
    with llama_cpp.LlamaSource(tiny, edit=("misbehaviour:zero", {"at": "layers.0.attn_out", "first": 3})) as found:
        seen = found.run(TOKENS, "layers.0.*", prompt=5)
    assert not seen["layers.0.attn_out"].values[3:].any()
    assert seen["layers.0.attn_out"].values[:3].all(axis=-1).all()
    stream = seen["layers.0.ffn_inp"].values[3:]
    assert np.array_equal(stream, aprlab.trace(aprlab.open_model(tiny), TOKENS, "embed")["embed"].values[3:])


@pytest.mark.peer
def test_a_file_that_llama_does_not_load_is_refused(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = aprlab.open_model(tiny)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-4096])
    model.path = cut
    with pytest.raises(UnsupportedError) as caught:
        llama_cpp.LlamaSource(model)
    assert caught.value.code == "source.llama-refuses"


def test_nodes_are_known_by_name_and_operation() -> None:
    nodes = Nodes(biased=True)
    graph = {
        ("embd", "GET_ROWS"): "embed", ("norm-0", "RMS_NORM"): None, ("Qcur-0", "MUL_MAT"): None, ("Qcur-0", "ADD"): "layers.0.q",
        ("Qcur-0", "ROPE"): "layers.0.q_rope", ("kqv_out-0", "CONT"): "layers.0.attn", ("node_9", "MUL_MAT"): "layers.0.attn_out",
        ("node_10", "MUL_MAT"): None, ("ffn_out-12", "MUL_MAT"): "layers.12.down", ("result_output", "MUL_MAT"): "logits",
    }  # fmt: skip
    assert [nodes.point(*node) for node in graph] == list(graph.values())
    plain = Nodes(biased=False)
    assert [plain.point("Qcur-3", op) for op in ("MUL_MAT", "ROPE")] == ["layers.3.q", "layers.3.q_rope"]
    assert plain.point("Kcur_normed-3", "MUL") == "layers.3.k_norm"


@pytest.mark.parametrize("spec", ["llama.cpp,cache=q8", "llama.cpp,flash=1", "llama.cpp,repack=1", "llama.cpp,contract=q8"])
def test_unknown_options_are_refused(tiny: Path, spec: str) -> None:
    with pytest.raises(UsageError):
        source(spec, tiny)


@pytest.mark.peer
@pytest.mark.parametrize("id", ["file theta 8e6", "relu", "kv-twice"])
def test_a_fault_of_llama_is_found_and_named(id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the evidence; all of it: `python tests/sources/foreign_evidence.py`."""
    pytest.importorskip("xllamacpp")
    import foreign_evidence as evidence

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([EDITS, str(evidence.HERE.parents[1])]))
    (case,) = [c for c in (*evidence.FILES, *evidence.OWN, *evidence.catalogue_cases()) if c.id == id]
    verdict, step, name, expected = evidence.examine(case, tmp_path)
    assert verdict.verdict == "broken"
    assert step, expected
    assert name, str(verdict)
    assert verdict.repair is not None
    before, after = (verdict.repair.proof[key] for key in ("before", "with the right values injected"))
    assert after["logits off"] < 0.1 * before["logits off"]


@pytest.mark.peer
@pytest.mark.parametrize(
    "config",
    [replace(CONFIG, architecture="qwen3", block_count=1),
     replace(CONFIG, architecture="llama", rope_type="norm", block_count=1, rope_factors=True)],
    ids=lambda config: config.architecture,
)  # fmt: skip
def test_other_architectures_are_read_and_within_their_contract(tmp_path: Path, config: ModelConfig) -> None:
    pytest.importorskip("xllamacpp")
    path = write_gguf(made_model(config), tmp_path / "m.gguf")
    with llama_cpp.LlamaSource(path) as found:
        given = found.run(TOKENS, prompt=5)
    assert list(given) == list(points(found.config))
    assert all(o.fits for o in shadow_of(given, Judges(aprlab.open_model(path), found.contract), found.config))


@pytest.mark.peer
def test_a_healthy_llama_is_within_its_contract(tiny: Path, package: str) -> None:
    name = f"{llama_cpp.PYTHON},repack=off" if package == llama_cpp.PYTHON else llama_cpp.NAME  # AMX crashes on some machines
    found = aprlab.peel(tiny, sources=[name, f"{name},flash=on"], prompt="Hi")
    assert (found.verdict, found.findings, found.exit_code) == ("equivalent", [], 0)
