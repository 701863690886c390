"""The ticket's software, modelled: its tables as the ticket has them, its chain of four steps, its figures, its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aprlab import quants
from aprlab.cli.app import run_cli
from aprlab.errors import FormatError, UsageError
from aprlab.faults import convert_with, upstream
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model import names
from aprlab.published import known_models
from aprlab.quants import types

QUESTION = "What is 2+2?"

# The ticket's "Complete DType Mapping Table": type, byte written, what the reader called it, whether it matched.
TICKET = [
    ("Q4_K", 8, "Q4", False),
    ("Q5_K", 8, "Q4", False),
    ("Q6_K", 9, "Q8_0", False),
    ("Q8_0", 10, "unknown → F32", False),
    ("F32", 0, "F32", True),
    ("F16", 1, "F16", True),
]
# The ticket's diff of the writer: "was … → now …"; now is ggml's number.
WAS = {"Q4_K": 8, "Q5_K": 12, "Q6_K": 9, "Q8_0": 10, "Q4_0": 11, "Q3_K": 13, "Q2_K": 14, "BF16": 2}
NOW = {"Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "Q8_0": 8, "Q4_0": 2, "Q3_K": 11, "Q2_K": 10, "BF16": 30}


def test_the_table_is_the_tickets() -> None:
    found = [(row["type"], row["writes"], row["reads"], row["right"]) for row in upstream.mismatch_table()]
    assert found == TICKET
    assert all(row["matches"] is None for row in upstream.mismatch_table())


def test_the_diff_is_the_tickets() -> None:
    assert {kind.name: byte for kind, byte in upstream.WRITER_CODE.items() if kind.name not in ("F32", "F16")} == WAS
    assert {name: types.by_name(name).code for name in NOW} == NOW


def test_every_quantised_type_of_the_writer_ends_as_something_else() -> None:
    """Over both of the writer's tables: no quantised type survives the round trip, both floats do."""
    for writer in (upstream.WRITER_TABLE, upstream.WRITER_CODE):
        survived = {kind.name for kind, byte in writer.items() if upstream.chain(byte).loaded is kind}
        assert survived == {"F32", "F16"}


@pytest.mark.parametrize(
    ("byte", "told"),
    [
        (8, 'byte 8 → "Q4" → no match → read as F32'),
        (9, 'byte 9 → "Q8_0" → no match → read as F32'),
        (10, 'byte 10 → unknown, so "F32" → no match → read as F32'),
        (12, 'byte 12 → "Q4_K" → matches Q4_K → read as Q4_K'),
        (1, 'byte 1 → "F16" → no match → read as F16'),
    ],
)
def test_the_chain_can_be_watched(byte: int, told: str) -> None:
    assert str(upstream.chain(byte)) == told


def test_no_byte_is_ever_an_error() -> None:
    loaded = {upstream.chain(byte).loaded.name for byte in range(256)}
    assert loaded == {"F32", "F16", "Q4_K", "Q6_K"}


# ── the load line ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_load_lines_of_the_ticket() -> None:
    wrong = upstream.load_line("qwen2.5-coder-1.5b", quantised=False)
    assert (wrong.layers, wrong.quantised, wrong.floats, wrong.megabytes) == (28, 0, 308, 10550)
    assert str(wrong) == (
        "[AprV2ModelCuda] Pre-cached 10550 MB of weights on GPU (28 layers, 0 quantized, 308 F32 tensors)"
    )  # word for word
    right = upstream.load_line("qwen2.5-coder-1.5b", quantised=True)
    assert (right.quantised, right.floats) == (197, 112)


def test_bytes_of_the_load_line_are_uploads() -> None:
    """Counted again from nothing but the published numbers."""
    e, f, kv, v, n = 1536, 8960, 256, 151936, 28
    once = e * e + 2 * kv * e + e * e + 3 * e * f
    again = e * e + 3 * e * f
    assert upstream.load_line("qwen2.5-coder-1.5b", quantised=False).nbytes == 4 * (n * (once + again) + v * e + (2 * n + 1) * e)


def test_all_known_models_obey_the_same_arithmetic() -> None:
    for name, known in known_models().items():
        layers = known.config["block_count"]
        wrong, right = (upstream.load_line(name, quantised=q) for q in (False, True))
        assert (wrong.floats, right.quantised, right.floats) == (11 * layers, 7 * layers + 1, 4 * layers)
        assert known.tensors["float"] == 5 * layers + 1 != right.floats
        if "quantised" in known.tensors:
            assert known.tensors["quantised"] == 7 * layers + 2


def test_the_load_line_of_an_opened_model(tiny: Path) -> None:
    with open_model(tiny) as model:
        assert upstream.load_line(model, quantised=True) == upstream.load_line(model.config, quantised=True)
        assert upstream.load_line(model, quantised=False).floats == 11 * model.config.block_count


# ── six corrections ───────────────────────────────────────────────────────────────────────────────────────────────


def test_1_uploads_are_no_inventory() -> None:
    found = upstream.double_upload()
    assert found.number == 1
    assert found.figures == {
        "floats": 308, "megabytes": 10550, "right_quantised": 197, "right_floats": 112,
        "true_quantised": 198, "true_floats": 141,
    }  # fmt: skip
    assert found.figures["true_quantised"] + found.figures["true_floats"] == 339 == len(list(names.inventory(28)))


def test_2_the_whole_model_in_f32() -> None:
    assert upstream.full_dequantisation().figures == {"parameters": 1_777_088_000, "bytes": 7_108_352_000, "gib": 6.62}


def test_2_parameters_are_those_of_the_file(tiny: Path) -> None:
    with open_model(tiny) as model:
        assert upstream.parameters(model) == sum(tensor.size for tensor in model.tensors.values())


def test_3_packed_blocks_are_no_plausible_floats(tiny: Path) -> None:
    found = upstream.not_plausible().figures
    assert found["filled"] == 144 / 4 / 256 == 0.140625
    assert 0.003 < found["not_finite"] < 0.012
    assert found["largest"] > 1e38
    with open_model(tiny) as model:
        raw = np.concatenate([t.raw for t in model.tensors.values() if t.type is types.Q4_K])
    bits = np.ascontiguousarray(raw).view("<u4")
    assert found["not_finite"] == pytest.approx(np.mean((bits >> 23) & 0xFF == 0xFF), rel=1e-12)  # exponent of all ones
    with pytest.raises(FormatError, match="not whole Q4_K blocks"):
        upstream.blocks_as_floats(np.zeros(100, np.uint8))


def test_4_the_naming_fix_lost_the_biases() -> None:
    assert upstream.third_layer().figures == {"biases": 84, "found_canonical": 84, "found_bare": 0}


def test_5_the_score_is_bookkeeping() -> None:
    found = upstream.bookkeeping().figures
    assert found == {"quality": 83, "score": 24.229, "best_possible": 44.7, "same_answer_passes": False}
    assert round(upstream.score(83), 1) == 24.2  # as printed
    assert sum(upstream.CATEGORIES.values()) == 1000
    assert upstream.score(1000) == 100
    assert upstream.score(0) == 0
    assert upstream.category_points(24, 24, 200) == 200


def test_6_ten_checks_see_nothing(tiny: Path, tmp_path: Path) -> None:
    assert upstream.blind_checks().figures == {"passed": 10, "of": 10}
    convert_with(tiny, tmp_path / "x.apr", ["q4k-min-lost", "lost-qkv-biases"])
    with open_model(tmp_path / "x.apr") as model:
        session = Session(model)
        garbage = session.generate(QUESTION, max_tokens=4, keep_logits=True)
        assert garbage.text != Session(open_model(tiny)).generate(QUESTION, max_tokens=4).text
        assert garbage.logits is not None
        written = [tensor.origin.name for tensor in model.tensors.values()]
        checks = upstream.ten_checks(written, garbage.prompt_tokens, garbage.logits[0])
    assert len(checks) == 10
    assert all(checks.values())


@pytest.mark.parametrize(
    ("written", "tokens", "logits", "fails"),
    [
        (["a.norm", "lm_head"], [1], [1.0, 2.0], {"embedding", "q, k, v", "attention", "feed forward"}),
        (["emb", "q_proj", "o_proj", "gate_proj", "norm"], [], [1.0, 2.0], {"tokenizer"}),
        (["emb", "q_proj", "o_proj", "gate_proj", "norm"], [1], [1.0, np.nan], {"probabilities"}),
    ],
)
def test_6_what_the_ten_checks_do_see(written: list[str], tokens: list[int], logits: list[float], fails: set[str]) -> None:
    checks = upstream.ten_checks(written, tokens, np.array(logits, np.float32))
    assert {stage for stage, passed in checks.items() if not passed} == fails


def test_there_are_six() -> None:
    assert [correction().number for correction in upstream.CORRECTIONS] == [1, 2, 3, 4, 5, 6]
    assert all(c.claim and c.truth and c.figures for c in (correction() for correction in upstream.CORRECTIONS))


@pytest.mark.real
def test_3_and_4_on_the_real_model(real_15b: Path) -> None:
    with open_model(real_15b) as model:
        found = upstream.blocks_as_floats(model.tensors["blk.0.ffn_gate.weight"].raw)
        assert 0.004 < found["not_finite"] < 0.011
        assert found["largest"] > 3e38
        bias = model.tensors["blk.0.attn_k.bias"].dequantise()
        assert (round(float(bias.min())), round(float(bias.max()))) == (-354, 318)
        assert upstream.parameters(model) == 1_777_088_000


# ── the reader ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_reads_a_right_file_rightly(tiny: Path, tmp_path: Path) -> None:
    convert_with(tiny, tmp_path / "x.apr", [])
    right = Session(open_model(tiny)).generate(QUESTION, max_tokens=6)
    assert upstream.session(tmp_path / "x.apr").generate(QUESTION, max_tokens=6).tokens == right.tokens


def test_four_steps_from_a_byte_to_garbage(tiny: Path, tmp_path: Path) -> None:
    convert_with(tiny, tmp_path / "x.apr", ["GH-191"])
    model = upstream.read(tmp_path / "x.apr")
    assert set(model.by_type()) == {"F32"}
    assert model.quantised == 0
    with open_model(tiny) as healthy:
        packed = healthy.tensors["blk.1.ffn_gate.weight"]
        seen = model.tensors["blk.1.ffn_gate.weight"]
        count = packed.nbytes // 4
        values = seen.dequantise().reshape(-1)
        assert seen.shape == packed.shape
        assert np.array_equal(values[:count].view(np.uint32), np.ascontiguousarray(packed.raw).view("<u4"))
        assert not values[count:].any()
        last = healthy.config.vocab_size - 1
    answer = upstream.session(tmp_path / "x.apr").generate(QUESTION, max_tokens=5)
    assert answer.tokens == [last] * 5  # NaN, and the last of equals


def test_bare_names_lose_the_biases_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    convert_with(tiny, tmp_path / "x.apr", ["GH-190"])
    convert_with(tiny, tmp_path / "y.apr", ["lost-qkv-biases"])
    seen, zeroed = upstream.read(tmp_path / "x.apr"), open_model(tmp_path / "y.apr")
    assert set(seen.tensors) == set(zeroed.tensors)
    for name, tensor in zeroed.tensors.items():
        assert np.array_equal(tensor.raw, seen.tensors[name].raw), name
    layers = zeroed.config.block_count
    assert f"{3 * layers} Q/K/V biases not found under model.layers.N…: left out" in seen.warnings


def test_missing_keys_take_upstreams_defaults(tiny: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from aprlab.conversion.converter import convert
    from aprlab.conversion.seams import Seams

    lost = ("rope_theta", "rope_type", "rms_norm_eps", "num_kv_heads", "max_position_embeddings")

    def forget(s: Seams) -> Seams:
        return replace(s, metadata=lambda metadata: {k: v for k, v in metadata.items() if k not in lost})

    convert(tiny, tmp_path / "x.apr", seams=forget)
    config = upstream.read(tmp_path / "x.apr").config
    assert (config.rope_theta, config.rope_type, config.rms_norm_eps, config.context_length) == (1e4, "norm", 1e-6, 2048)
    assert config.head_count_kv == config.head_count
    with pytest.raises(FormatError, match="which is refused here"):
        assert open_model(tmp_path / "x.apr").config


def test_other_types_come_out_wrong_too(tiny: Path, tmp_path: Path) -> None:
    """A right Q8_0 file: byte 8 is "Q4" to this reader, and so F32; Q5_0 (6) is an integer, and so F32."""
    for quantize, byte in (("q8_0", 8), ("q5_0", 6)):
        convert_with(tiny, tmp_path / "x.apr", [], quantize=quantize, force=True)
        assert set(upstream.read(tmp_path / "x.apr").by_type()) == {"F32"}
        assert upstream.chain(byte).loaded is types.F32


def test_the_dialect_with_raw_names_is_turned_round(tiny: Path, tmp_path: Path) -> None:
    convert_with(tiny, tmp_path / "x.apr", [], dialect="realizar")
    with open_model(tiny) as right:
        seen = upstream.read(tmp_path / "x.apr")
        assert {name: t.shape for name, t in seen.tensors.items()} == {name: t.shape for name, t in right.tensors.items()}
        assert not seen.tensors["blk.0.attn_q.bias"].dequantise().any()  # asked for as model.layers.0…, not there


def test_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.apr"
    convert_with(tiny, out, ["GH-191", "GH-190"])
    arguments = ["run", str(out), "-p", QUESTION, "-n", "3", "--reader"]
    assert run_cli([*arguments, "upstream-2026-01-30"]) == 1  # upstream ended with 0
    told = capsys.readouterr()
    assert 'byte 8 → "Q4" → no match → read as F32' in told.err
    assert "0 quantized" in told.err
    assert "logits that are NaN" in told.err
    assert "[PAD" in told.out
    assert run_cli(["run", str(out), "-p", QUESTION]) == 2
    assert run_cli([*arguments, "upstream"]) == 2
    assert "unknown reader 'upstream'" in capsys.readouterr().err
    assert run_cli([*arguments, "upstream-2026-01-30", "--fault", "rope-norm"]) == 2
    with pytest.raises(UsageError, match="has no Q4_K tensors"):
        convert_with(tiny, tmp_path / "f.apr", ["default-dequantise"])
        upstream.not_plausible(open_model(tmp_path / "f.apr"))


def test_a_float_file_is_what_every_table_agrees_on(tiny: Path, tmp_path: Path) -> None:
    convert_with(tiny, tmp_path / "x.apr", ["default-dequantise"])
    seen = upstream.read(tmp_path / "x.apr")
    with open_model(tiny) as right:
        tensor = right.tensors["blk.0.ffn_down.weight"]
        assert np.array_equal(seen.tensors[tensor.name].dequantise(), quants.dequantise(tensor.raw, tensor.type, tensor.shape))
