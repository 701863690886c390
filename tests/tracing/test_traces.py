"""Traces: every point is there, knows its positions, survives the disk, and a broken file is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import CONFIG, random_model
from oracle import logits_and_tolerance

from aprlab.architectures import points
from aprlab.engines.reference import ReferenceEngine
from aprlab.errors import FormatError, UsageError
from aprlab.faults import session_with
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.tracing.comparisons import compare_traces, layer_errors, position_errors
from aprlab.tracing.traces import Point, Summary, Trace, matching, replay, trace

TOKENS = [5, 200, 17, 3, 299]


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="module")
def full(model: Model) -> Trace:
    return trace(model, TOKENS)


def test_every_point_is_there_with_its_shape_positions_and_contract(full: Trace) -> None:
    assert list(full) == list(points(CONFIG))
    for name, shape in points(CONFIG).items():
        point = full[name]
        assert point.values.shape == (len(TOKENS), *shape)
        assert point.values.dtype == np.float32
        assert point.positions.tolist() == [0, 1, 2, 3, 4]
        assert (point.name, point.engine, point.contract) == (name, "reference", "f32")
    assert (full.engine, full.contract, full.tokens, full.config) == ("reference", "f32", TOKENS, CONFIG)


def test_points_hold_what_their_names_say(full: Trace, model: Model) -> None:
    """Relations between neighbours, computed here: a point under a wrong name breaks one of them."""
    v = {name: full[name].values.astype(np.float64) for name in full}
    w = {name: t.dequantise().astype(np.float64) for name, t in model.tensors.items()}

    def rms(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * w[name]

    def close(a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a.reshape(len(TOKENS), -1), b.reshape(len(TOKENS), -1), atol=2e-5 * np.abs(b).max(), rtol=0)

    close(v["embed"], w["token_embd.weight"][TOKENS])
    for n in range(CONFIG.block_count):
        p, b = f"layers.{n}.", f"blk.{n}."
        before = v["embed"] if n == 0 else v[f"layers.{n - 1}.out"]
        close(v[p + "attn_norm"], rms(before, b + "attn_norm.weight"))
        for s in "qkv":
            close(v[p + s], v[p + "attn_norm"] @ w[f"{b}attn_{s}.weight"].T + w[f"{b}attn_{s}.bias"])
        for s in "qk":
            np.testing.assert_allclose(v[f"{p}{s}_rope"][0], v[p + s][0], atol=1e-6)  # position 0 does not turn
            assert np.abs(v[f"{p}{s}_rope"][1:] - v[p + s][1:]).max() > 0.1
        first = v[p + "v"][0].repeat(CONFIG.head_count // CONFIG.head_count_kv, axis=0).reshape(-1)
        np.testing.assert_allclose(v[p + "attn"][0], first, atol=1e-6)  # position 0 sees only itself
        close(v[p + "attn_out"], v[p + "attn"] @ w[b + "attn_output.weight"].T)
        close(v[p + "ffn_inp"], before + v[p + "attn_out"])
        close(v[p + "ffn_norm"], rms(v[p + "ffn_inp"], b + "ffn_norm.weight"))
        close(v[p + "gate"], v[p + "ffn_norm"] @ w[b + "ffn_gate.weight"].T)
        close(v[p + "up"], v[p + "ffn_norm"] @ w[b + "ffn_up.weight"].T)
        close(v[p + "swiglu"], v[p + "gate"] / (1 + np.exp(-v[p + "gate"])) * v[p + "up"])
        close(v[p + "down"], v[p + "swiglu"] @ w[b + "ffn_down.weight"].T)
        close(v[p + "out"], v[p + "ffn_inp"] + v[p + "down"])
    close(v["norm"], rms(v[f"layers.{CONFIG.block_count - 1}.out"], "output_norm.weight"))
    close(v["logits"], v["norm"] @ w["output.weight"].T)


def test_chunks_and_last_position_agree_with_the_whole(full: Trace, model: Model) -> None:
    _, tolerance = logits_and_tolerance(model, CONFIG, TOKENS)
    for chunk in (1, 2):
        parts = trace(model, TOKENS, chunk=chunk)
        last = trace(model, TOKENS, chunk=chunk, positions="last")
        for name in full:
            assert parts[name].positions.tolist() == [0, 1, 2, 3, 4]
            np.testing.assert_allclose(parts[name].values, full[name].values, atol=2 * tolerance)
            assert last[name].positions.tolist() == [4]
            np.testing.assert_allclose(last[name].values, full[name].values[-1:], atol=2 * tolerance)
    assert np.abs(full["logits"].values[-1] - full["logits"].values[-2]).max() > 100 * tolerance


def test_filter(model: Model, full: Trace) -> None:
    some = trace(model, TOKENS, "layers.*.out, embed")
    assert list(some) == ["embed", "layers.0.out", "layers.1.out", "layers.2.out"]
    for name in some:
        np.testing.assert_array_equal(some[name].values, full[name].values)
    assert list(full.select(["layers.1.q*"])) == ["layers.1.q", "layers.1.q_rope"]
    assert "layers.0.q" in full
    assert "layers.3.q" not in full
    assert matching("*", ["a", "b"]) == ["a", "b"]


def test_prompts_go_in_as_for_generate(model: Model) -> None:
    session = Session(model)
    for source in (session, session.engine, model):
        for prompt, options in (("hello", {}), ("hello", {"raw": True}), ("hello", {"system": "world"})):
            got = trace(source, prompt, "logits", **options).tokens
            assert got == session.prompt_tokens(prompt, **options)


def test_point_at_a_position(full: Trace) -> None:
    np.testing.assert_array_equal(full["layers.0.k"].at(3), full["layers.0.k"].values[3])
    with pytest.raises(UsageError, match=r"layers\.0\.k holds positions 0…4, not 5"):
        full["layers.0.k"].at(5)


# -- the summary -------------------------------------------------------------------------------------------------------


def test_summary_of_known_values() -> None:
    values = np.array([[1.0, -3.0], [np.nan, 2.0], [np.inf, 4.0]], np.float32)
    point = Point("x", values, np.arange(3), "reference", "f32")
    assert point.summary() == Summary("x", (3, 2), 1.0, np.sqrt(6.5), -3.0, 4.0, np.sqrt(30.0), nan=1, inf=1)
    line = str(point.summary())
    for part in (
        "3 × 2",
        "mean           1",
        "std      2.5495",
        "min          -3",
        "max           4",
        "l2      5.4772",
        "NaN 1",
        "Inf 1",
    ):
        assert part in line


def test_summary_of_nothing_finite() -> None:
    s = Point("x", np.full((1, 2), np.nan, np.float32), np.arange(1), "reference", "f32").summary()
    assert (s.mean, s.l2, s.nan, s.inf) == (None, None, 2, 0)
    assert "mean           –" in str(s)


def test_text_and_html_name_every_point(full: Trace) -> None:
    assert [line.split()[0] for line in str(full).splitlines()] == list(full)
    page = full._repr_html_()
    assert all(f">{name}</td>" in page for name in full)
    assert "0…4" in page
    assert "5 tokens, reference (f32)" in repr(full)


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_it_comes_back_from_disk_as_it_was(full: Trace, tmp_path: Path) -> None:
    path = full.save(tmp_path / "t.npz")
    back = Trace.load(path)
    assert list(back) == list(full)
    for name in full:
        a, b = full[name], back[name]
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.positions, b.positions)
        assert (a.engine, a.contract, a.name) == (b.engine, b.contract, b.name)
    assert (back.tokens, back.engine, back.contract, back.config, back.source) == (
        full.tokens, full.engine, full.contract, full.config, full.source,
    )  # fmt: skip
    header = json.loads(np.load(path)["header"].tobytes())  # readable without aprlab
    assert header["points"]["layers.0.q"]["shape"] == [5, 6, 32]
    with pytest.raises(UsageError, match="exists already"):
        full.save(path)
    full.select("embed").save(path, force=True)
    assert list(Trace.load(path)) == ["embed"]
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def rewritten(path: Path, change: Any) -> None:
    """The file with its header changed by `change(header, arrays)`."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, arrays: header.update(version=2),
        lambda header, arrays: header.update(kind="something else"),
        lambda header, arrays: header.pop("tokens"),
        lambda header, arrays: header["config"].pop("rope_theta"),
        lambda header, arrays: header["points"]["embed"].update(shape=[1, 2]),
        lambda header, arrays: header["points"]["embed"].update(positions=7),
        lambda header, arrays: header["positions"][0].pop(),
        lambda header, arrays: arrays.pop("embed"),
        lambda header, arrays: arrays.update(embed=arrays["embed"].astype(np.float64)),
    ],
)
def test_headers_that_contradict_the_arrays(full: Trace, tmp_path: Path, change: Any) -> None:
    path = full.select("embed").save(tmp_path / "t.npz")
    rewritten(path, change)
    with pytest.raises(FormatError, match=r"t\.npz"):
        Trace.load(path)


def test_files_that_are_no_traces(full: Trace, tmp_path: Path) -> None:
    path = full.select("embed").save(tmp_path / "t.npz")
    whole = path.read_bytes()
    for content in (b"", b"GGUF", whole[: len(whole) // 2], whole[:300] + b"\xff" * 40 + whole[340:]):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="not a trace"):
            Trace.load(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("header.npy", "x")
    with pytest.raises(FormatError, match="not a trace"):
        Trace.load(path)
    np.save(tmp_path / "t.npy", np.ones(3))
    with pytest.raises(FormatError, match="not a trace"):
        Trace.load(tmp_path / "t.npy")
    np.savez(path, header=np.array([{"pickled": True}], dtype=object))
    with pytest.raises(FormatError, match="not a trace"):
        Trace.load(path)
    with pytest.raises(UsageError, match="cannot be read"):
        Trace.load(tmp_path / "nowhere.npz")


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS, {"points": "layers.3.*"}, r"no trace point matches 'layers\.3\.\*'.*embed"),
        (TOKENS, {"points": "embed,layer.*"}, "'layer"),
        (TOKENS, {"positions": "first"}, "'first'.*'all'"),
        (TOKENS, {"chunk": 0}, "chunk 0"),
        ([], {}, "no tokens"),
        ([300], {}, "token 300"),
        (list(range(129)), {}, "129 tokens exceed the context of 128"),
    ],
)
def test_senseless_requests(model: Model, tokens: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trace(model, tokens, **options)
    with pytest.raises(UsageError, match="holds no point 'nonsense'"):
        trace(model, TOKENS, "embed")["nonsense"]


def test_a_missing_bias_is_named() -> None:
    model = random_model()
    del model.tensors["blk.0.attn_q.bias"]
    with pytest.raises(FormatError, match=r"blk\.0\.attn_q\.bias"):
        trace(ReferenceEngine(model), TOKENS)


# -- replay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["lost-k-biases", "rope-norm", "gqa-modulo"])
def test_a_replay_differs_where_the_fault_is_and_nowhere_else(model: Model, full: Trace, fault: str) -> None:
    """Each step on the healthy run's inputs: what a fault hands on is gone, what it does itself stays."""
    broken = session_with(model, [fault])
    replayed = replay(broken, full)
    guilty = {"lost-k-biases": {"k"}, "rope-norm": {"q_rope", "k_rope"}, "gqa-modulo": {"attn"}}[fault]
    differing = {row["point"] for row in compare_traces(full, replayed).differing()}
    assert differing == {f"layers.{n}.{step}" for n in range(CONFIG.block_count) for step in guilty}
    by_itself = compare_traces(full, trace(broken, TOKENS)).differing()
    assert len(by_itself) > len(differing), "by itself it hands its error on"


def test_a_healthy_replay_changes_nothing(model: Model, full: Trace) -> None:
    assert compare_traces(full, replay(Session(model), full)).equal
    alone = trace(model, TOKENS, chunk=1)
    assert compare_traces(alone, replay(Session(model), alone, chunk=1)).equal


def test_a_replay_needs_a_whole_trace(model: Model, full: Trace) -> None:
    with pytest.raises(UsageError, match="holds no point 'embed'"):
        replay(Session(model), full.select("layers.*"))
    with pytest.raises(UsageError, match="embed of the given trace holds 1 positions of 5"):
        replay(Session(model), trace(model, TOKENS, positions="last"))


def test_errors_by_layer_step_and_position(model: Model, full: Trace) -> None:
    broken = trace(session_with(model, ["rope-norm"]), TOKENS)
    steps, errors = layer_errors(full, broken)
    assert errors.shape == (CONFIG.block_count, len(steps)) == (CONFIG.block_count, 15)
    first = dict(zip(steps, errors[0], strict=True))
    assert [step for step in steps[:6] if first[step]] == ["q_rope", "k_rope"]
    row = {row["point"]: row["rel_l2"] for row in compare_traces(full, broken).rows}
    assert first["q_rope"] == row["layers.0.q_rope"]
    by_position = position_errors(full, broken)
    assert by_position.shape == (CONFIG.block_count, len(TOKENS))
    assert not by_position[:, 0].any(), "position 0 is not turned at all"
    assert by_position[:, 1:].all()
