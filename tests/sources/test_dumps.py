"""Dumps: a mapping declares what each array is; a wrong declaration is found and named, a broken one refused with its line."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from variants import first_layers

from aprlab.errors import AprlabError
from aprlab.faults import session_with
from aprlab.formats import open_model
from aprlab.model.model import Model
from aprlab.onion.source_peeling import peel_sources
from aprlab.sources import source
from aprlab.tracing.traces import Trace

TOKENS = [5, 9, 30, 77, 41, 8]
STEPS = {"q": "q_proj", "q_rope": "q_rot", "attn_norm": "ln1", "down": "mlp", "ffn_inp": "mid", "out": "hidden", "gate": "gate"}


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    """The first two layers of the embedded model."""
    return first_layers(open_model(tiny), 2)


@pytest.fixture(scope="module")
def healthy(model: Model) -> Trace:
    with source("reference", model) as ours:
        return ours.run(TOKENS)


def written(
    folder: Path, healthy: Trace, change: Callable[[dict[str, np.ndarray], dict[str, Any]], None] = lambda arrays, mapping: None
) -> str:
    """Arrays under foreign names, and a mapping that is right; both changed."""
    arrays = {f"layer{n}/{theirs}": healthy[f"layers.{n}.{ours}"].values for n in range(2) for ours, theirs in STEPS.items()}
    arrays |= {"wte": healthy["embed"].values, "head": healthy["logits"].values[-1:]}
    points: dict[str, Any] = {f"layer{{n}}/{theirs}": f"layers.{{n}}.{ours}" for ours, theirs in STEPS.items()}
    points |= {"wte": "embed", "head": {"point": "logits", "positions": "last"}}
    mapping = {"arrays": "d.npz", "program": "theirs", "contract": "f32", "tokens": list(TOKENS), "points": points}
    change(arrays, mapping)
    np.savez(folder / "d.npz", allow_pickle=False, **arrays)
    (folder / "d.yaml").write_text(yaml.safe_dump(mapping))
    return str(folder / "d.yaml")


def test_a_dump_is_judged_like_any_program(model: Model, healthy: Trace, tmp_path: Path) -> None:
    found = source(written(tmp_path, healthy), model).run(TOKENS)
    assert found["logits"].positions.tolist() == [5]
    assert np.array_equal(found["layers.1.q_rope"].values, healthy["layers.1.q_rope"].values)
    verdict = peel_sources(model, [str(tmp_path / "d.yaml")], prompt=TOKENS)
    assert (verdict.verdict, verdict.findings) == ("equivalent", [])


def test_a_fault_in_a_dump_is_a_fault(model: Model, healthy: Trace, tmp_path: Path) -> None:
    def double(arrays: dict[str, np.ndarray], mapping: dict[str, Any]) -> None:
        arrays["layer1/mid"] = 2 * arrays["layer1/mid"]  # everything after it is computed from another value

    verdict = peel_sources(model, [written(tmp_path, healthy, double)], prompt=TOKENS)
    assert verdict.verdict == "broken"
    assert verdict.first_divergence is not None and verdict.first_divergence["point"] == "layers.1.ffn_inp"


def moved(old: str, new: Any) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    def change(arrays: dict[str, np.ndarray], mapping: dict[str, Any]) -> None:
        points = mapping["points"]
        others = {name: what for name, what in points.items() if what != new}
        mapping["points"] = {**others, old: new}

    return change


def heads_first(arrays: dict[str, np.ndarray], mapping: dict[str, Any]) -> None:
    arrays["layer1/q_proj"] = np.ascontiguousarray(arrays["layer1/q_proj"].swapaxes(0, 1))


def first_for_last(arrays: dict[str, np.ndarray], mapping: dict[str, Any]) -> None:
    arrays["layer1/gate"] = arrays["layer1/gate"][:1]
    mapping["points"].pop("layer{n}/gate")
    mapping["points"]["layer1/gate"] = {"point": "layers.1.gate", "positions": "last"}


def other_tokens(arrays: dict[str, np.ndarray], mapping: dict[str, Any]) -> None:
    mapping["tokens"] = [1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("change", "declared", "found"),
    [
        (moved("layer{n}/q_rot", "layers.{n}.q"), "layers.0.q", "layers.0.q_rope"),  # after the rotation
        (moved("layer{n}/mlp", "layers.{n}.out"), "layers.0.out", "layers.0.down"),  # without the residual
        (moved("layer{n}/mid", "layers.{n}.attn_norm"), "layers.0.attn_norm", "layers.0.ffn_inp"),  # an input, no output
        (heads_first, "layers.1.q", "layers.1.q, layout heads-first"),
        (first_for_last, "layers.1.gate", "layers.1.gate at positions 0…0"),
        (other_tokens, "tokens", f"a run of the tokens {TOKENS}"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_named_and_is_no_finding_about_the_program(
    model: Model, healthy: Trace, tmp_path: Path, change: Any, declared: str, found: str
) -> None:
    verdict = peel_sources(model, [written(tmp_path, healthy, change)], prompt=TOKENS)
    assert verdict.verdict == "not-comparable"
    named = [(f.parameters["declared"], f.parameters["found"]) for f in verdict.findings]
    assert (declared, found) in named
    assert {f.code for f in verdict.findings} == {"instrument.declared-otherwise"}


def without(key: str) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    return lambda arrays, mapping: mapping.pop(key)


def with_point(name: str, what: Any) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    return lambda arrays, mapping: mapping["points"].update({name: what})


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (without("tokens"), "dump.mapping"), (without("contract"), "dump.mapping"), (without("points"), "dump.mapping"),
        (with_point("wte", {"point": "embed", "layout": "sideways"}), "dump.mapping"),
        (with_point("wte", {"point": "embed", "positions": [99]}), "dump.mapping"),
        (with_point("wte", "layers.0.nothing"), "dump.no-point"), (with_point("absent", "norm"), "dump.no-array"),
        (with_point("layer1/ln1", "embed"), "dump.point-twice"), (with_point("layer{n}/gate", "layers.{n}.k"), "dump.shape"),
        (lambda arrays, mapping: mapping.update(contract="f8"), "engines.unknown-contract"),
        (lambda arrays, mapping: mapping.update(arrays="absent.npz"), "dump.unreadable"),
    ],
)  # fmt: skip
def test_a_mapping_that_contradicts_the_arrays_is_refused(
    model: Model, healthy: Trace, tmp_path: Path, change: Any, code: str
) -> None:
    with pytest.raises(AprlabError) as caught:
        source(written(tmp_path, healthy, change), model)
    assert caught.value.code == code


def test_a_pickle_is_never_loaded(model: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", wte=np.array([{"a": 1}], dtype=object))
    mapping = {"arrays": "d.npz", "program": "x", "contract": "f32", "tokens": [1], "points": {"wte": "embed"}}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(mapping))
    with pytest.raises(AprlabError) as caught:
        source(str(tmp_path / "d.yaml"), model)
    assert caught.value.code == "dump.not-arrays"


@pytest.mark.parametrize("form", ["folder", "safetensors"])
def test_other_files_of_arrays(model: Model, healthy: Trace, tmp_path: Path, form: str) -> None:
    values = healthy["embed"].values
    if form == "folder":
        (tmp_path / "d").mkdir()
        np.save(tmp_path / "d" / "wte.npy", values[None].astype(np.float64))  # a batch of one
    else:
        save = pytest.importorskip("safetensors.numpy").save_file
        save({"wte": values[None]}, tmp_path / "d.safetensors")
    name = "d" if form == "folder" else "d.safetensors"
    mapping = {"arrays": name, "program": "x", "contract": "f32", "tokens": TOKENS, "points": {"wte": "embed"}}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(mapping))
    assert np.array_equal(source(str(tmp_path / "d.yaml"), model).run(TOKENS)["embed"].values, values)


STAGES = {
    "layer-0/embedding": "embed", "layer-{n}/attn_norm": "layers.{n}.attn_norm", "layer-{n}/q_post_rope": "layers.{n}.q_rope",
    "layer-{n}/attention": "layers.{n}.attn", "layer-{n}/attn_out": "layers.{n}.attn_out",
    "layer-{n}/post_attn_residual": "layers.{n}.ffn_inp", "layer-{n}/ffn_norm": "layers.{n}.ffn_norm",
    "layer-{n}/ffn_gate": "layers.{n}.gate", "layer-{n}/ffn_up": "layers.{n}.up", "layer-{n}/ffn_swigl": "layers.{n}.swiglu",
    "layer-{n}/ffn_out": "layers.{n}.down", "layer-{n}/post_ffn_residual": "layers.{n}.out", "final_norm": "norm",
    "lm_head": "logits",
}  # fmt: skip


def aprt(folder: Path, trace: Trace) -> str:
    """Files as `apr trace --save-tensor` leaves them: magic, layer, count, values; of the logits the last position."""
    for stage, point in STAGES.items():
        for n in range(2 if "{n}" in stage else 1):
            values = trace[point.format(n=n)].values[-1 if stage == "lm_head" else 0 :]
            path = folder / "stages" / f"{stage.format(n=n)}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            head = struct.pack("<4sII", b"APRT", n if "layer" in stage else 0xFFFFFFFF, values.size)
            path.write_bytes(head + values.astype("<f4").tobytes())
    mapping = {"arrays": "stages", "program": "apr", "contract": "f32", "tokens": TOKENS, "points": "aprt"}
    (folder / "d.yaml").write_text(yaml.safe_dump(mapping))
    return str(folder / "d.yaml")


def test_upstreams_aprt_files_are_a_dump(model: Model, healthy: Trace, tmp_path: Path) -> None:
    assert peel_sources(model, [aprt(tmp_path, healthy)], prompt=TOKENS).verdict == "equivalent"
    with source(session_with(model, ["layer-norm"], "reference")) as theirs:
        verdict = peel_sources(model, [aprt(tmp_path, theirs.run(TOKENS))], prompt=TOKENS)
    assert (verdict.verdict, verdict.faults) == ("broken", ["layer-norm"])
    assert verdict.first_divergence is not None and verdict.first_divergence["point"] == "layers.0.attn_norm"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: b"APRX" + raw[4:], "not with b'APRT'"), (lambda raw: raw[:-4], "are there"), (lambda raw: raw[:7], "begins"),
        (lambda raw: raw[:4] + b"\1\0\0\0" + raw[8:], "it lies in layer-0"),
    ],
)  # fmt: skip
def test_an_aprt_file_that_is_none_is_refused(
    model: Model, healthy: Trace, tmp_path: Path, change: Callable[[bytes], bytes], said: str
) -> None:
    path = aprt(tmp_path, healthy)
    broken = tmp_path / "stages" / "layer-0" / "attn_norm.bin"
    broken.write_bytes(change(broken.read_bytes()))
    with pytest.raises(AprlabError) as caught:
        source(path, model)
    assert caught.value.code == "dump.not-arrays" and said in str(caught.value) and "attn_norm" in str(caught.value)


def test_names_of_modules_are_known_and_a_name_may_have_parts_that_change(model: Model, healthy: Trace, tmp_path: Path) -> None:
    mapping = {"arrays": "d.npz", "program": "x", "contract": "f32", "tokens": TOKENS, "points": "modules"}
    np.savez(tmp_path / "d.npz", **{"model.layers.1.mlp.up_proj": healthy["layers.1.up"].values, "other": np.zeros(3)})
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(mapping))
    assert list(source(str(tmp_path / "d.yaml"), model).can.points) == ["layers.1.up"]
    np.savez(tmp_path / "d.npz", **{"pass=3___name=mlp_up___layer=1": healthy["layers.1.up"].values})
    with pytest.raises(AprlabError) as caught:
        source(str(tmp_path / "d.yaml"), model)
    assert caught.value.code == "dump.no-array"
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(mapping | {"points": {"pass={*}name=mlp_up{*}layer={n}": "layers.{n}.up"}}))
    assert list(source(str(tmp_path / "d.yaml"), model).can.points) == ["layers.1.up"]
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(mapping | {"points": "those of my engine"}))
    with pytest.raises(AprlabError) as caught:
        source(str(tmp_path / "d.yaml"), model)
    assert caught.value.code == "dump.mapping" and "aprt, modules" in str(caught.value)


def test_arrays_without_a_mapping_are_no_source(model: Model, tmp_path: Path) -> None:
    for what in (str(tmp_path), "a.safetensors", "layer-0/attn_norm.bin", "run.pt"):
        with pytest.raises(AprlabError) as caught:
            source(what, model)
        assert caught.value.code == "source.needs-mapping"


def test_a_trace_on_disk_is_a_source_and_runs_nothing_else(model: Model, healthy: Trace, tmp_path: Path) -> None:
    kept = source(str(healthy.save(tmp_path / "t.npz")), model)
    assert np.array_equal(kept.run(TOKENS, "norm")["norm"].values, healthy["norm"].values)
    for code, call in (
        ("source.other-tokens", lambda: kept.run([1, 2])),
        ("source.no-answer", lambda: kept.answer(TOKENS, 1)),
        ("source.no-injection", lambda: kept.run(TOKENS, inject={"norm": healthy["norm"]})),
    ):
        with pytest.raises(AprlabError) as caught:
            call()
        assert caught.value.code == code
