"""Run faults: where the pass goes wrong first, at which positions, and in which way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import CONFIG, random_model
from faulty_runs import QUESTION, Base, first_difference

from aprlab.errors import FormatError
from aprlab.faults import FAULTS, OTHER_ARCHITECTURES, file_faults, naming, run_faults, session_with
from aprlab.faults.attention import PlainAttention, four_bits
from aprlab.faults.forward import KvStale, last_of_equals, q8_k
from aprlab.faults.products import e4m3
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.tracing.traces import trace

EVERY, LATER = "every position", "every position but 0"
# id -> (first point that differs in one pass over the prompt, in passes of one token each, at which positions)
FIRST: dict[str, tuple[str | None, str | None, str]] = {
    "lost-qkv-biases": ("layers.0.q", "layers.0.q", EVERY),
    "lost-q-biases": ("layers.0.q", "layers.0.q", EVERY),
    "lost-k-biases": ("layers.0.k", "layers.0.k", EVERY),
    "lost-v-biases": ("layers.0.v", "layers.0.v", EVERY),
    "tied-lm-head": ("logits", "logits", EVERY),
    "lm-head-turned": ("logits", "logits", EVERY),
    "cache-key-mismatch": (None, None, ""),
    **{id: ("embed", "embed", EVERY) for id in FAULTS if id.startswith("q4k")},
    **dict.fromkeys(
        ("nibble-pairs", "q5-nibble-pairs", "q5-high-bits", "q5k-layout", "q3k-layout", "q2k-layout"), ("embed", "embed", EVERY)
    ),
    "q80-36-bytes": ("embed", "embed", EVERY),
    "scales-flushed": ("layers.0.v", "layers.0.v", EVERY),
    "scales-floored": ("layers.0.v", "layers.0.v", EVERY),
    "default-kernel": ("layers.0.v", "layers.0.v", EVERY),
    "rope-norm": ("layers.0.q_rope", "layers.0.q_rope", LATER),
    "rope-theta": ("layers.0.q_rope", "layers.0.q_rope", LATER),
    "gqa-modulo": ("layers.0.attn", "layers.0.attn", EVERY),
    "head-dim-guessed": ("layers.0.q_rope", "layers.0.q_rope", LATER),
    "layer-norm": ("layers.0.attn_norm", "layers.0.attn_norm", EVERY),
    "wrong-eps": ("layers.0.attn_norm", "layers.0.attn_norm", EVERY),
    "unweighted-norm": ("layers.0.attn_norm", "layers.0.attn_norm", EVERY),
    "zeroed-norm": ("layers.1.attn_norm", "layers.1.attn_norm", EVERY),
    "wrong-norm": ("layers.0.attn_norm", "layers.0.attn_norm", EVERY),
    "kv-twice": (None, "layers.0.q_rope", LATER),
    "kv-stale": ("layers.0.q_rope", "layers.0.q_rope", EVERY),
    "kv-empty": (None, "layers.0.attn", LATER),
    "kv-refed": (None, None, ""),
    "last-token-twice": (None, None, ""),
    "prefill-decode": (None, "layers.0.q", EVERY),
    "q8-activations": ("layers.0.q", "layers.0.q", EVERY),
    "massive-channel": ("layers.0.q", "layers.0.q", EVERY),
    "argmax-nan": ("norm", "norm", EVERY),
    "q6k-sequential": ("layers.0.v", "layers.0.v", EVERY),
    "q5k-qh-sequential": ("embed", "embed", EVERY),
    "legacy-as-q4k": ("embed", "embed", EVERY),
    "requantised-down": ("embed", "embed", EVERY),
    "requantised-sideways": ("embed", "embed", EVERY),
    "head-dim-halved": ("layers.0.q_rope", "layers.0.q_rope", LATER),
    "no-rope": ("layers.0.q_rope", "layers.0.q_rope", LATER),
    "kq-fp16": ("layers.0.attn", "layers.0.attn", LATER),
    "kv-q4": ("layers.0.attn", "layers.0.attn", LATER),
    "kv-slot-zero": (None, None, ""),  # only after a prompt of several tokens: a test of its own
    "kv-zero-prefix": ("layers.0.attn", "layers.0.attn", EVERY),
    "qkv-thirds": ("layers.0.q", "layers.0.q", EVERY),
    "gemv-transposed": ("layers.0.q", "layers.0.q", EVERY),
    "layers-cut": ("layers.2.attn_out", "layers.2.attn_out", EVERY),
    "fp16-residual": ("layers.0.ffn_inp", "layers.0.ffn_inp", EVERY),
    "fp8-unscaled": ("layers.0.q", "layers.0.q", EVERY),
    "phi-for-qwen2": ("layers.0.attn_norm", "layers.0.attn_norm", EVERY),
    "nan-sampled": ("norm", "norm", EVERY),
}
WORDS = {id for id, fault in run_faults().items() if fault.tokenizer is not None or fault.prompt is not None}


def test_every_run_fault_is_expected() -> None:
    others = {"mha-dims", "floor-blocks", "padded-activations", "zero-product"}
    assert set(FIRST) | WORDS | others == set(run_faults()) - OTHER_ARCHITECTURES


@pytest.mark.parametrize("id", sorted(FIRST))
def test_a_run_fault_goes_wrong_here_and_not_before(id: str, base: Callable[[str], Base]) -> None:
    found = base(id)
    session = session_with(found.model, [id])
    for chunk, expected in zip((None, 1), FIRST[id], strict=False):
        assert isinstance(expected, str | None)
        seen = first_difference(found.traces[chunk], trace(session, found.ids, chunk=chunk))
        if expected is None:
            assert seen is None
        else:
            count = len(found.ids)
            assert seen == (expected, list(range(count) if FIRST[id][2] == EVERY else range(1, count)))


def test_lost_biases_are_one_vector_at_every_position(base: Callable[[str], Base]) -> None:
    found = base("lost-qkv-biases")
    wrong = trace(session_with(found.model, ["lost-qkv-biases"]), found.ids, "layers.0.*")
    for point in "qkv":
        right = found.traces[None].points[f"layers.0.{point}"].values
        apart = (right - wrong.points[f"layers.0.{point}"].values).reshape(len(found.ids), -1)
        bias = found.model.tensors[f"blk.0.attn_{point}.bias"].dequantise()
        assert np.allclose(apart, bias, rtol=1e-4, atol=1e-4 * np.abs(right).max())


def test_a_turned_head_reads_down_the_channels(base: Callable[[str], Base]) -> None:
    """Logit i is of the numbers i·K … i·K+K-1 of the transposed weight, whose number p is channel p // V of token p mod V."""
    found = base("lm-head-turned")
    seen = trace(session_with(found.model, ["lm-head-turned"]), found.ids, "*")
    weight = found.model.tensors["output.weight"].dequantise()
    rows, cols = weight.shape
    at = np.arange(3 * cols) + (rows - 3) * cols  # the last three logits
    expected = seen.points["norm"].values @ weight[at % rows, at // rows].reshape(3, cols).T
    assert np.allclose(seen.points["logits"].values[:, -3:], expected, rtol=1e-4, atol=1e-4)


def test_the_rope_base_leaves_the_fastest_pair_alone(base: Callable[[str], Base]) -> None:
    found = base("rope-theta")
    half = found.model.config.head_dim // 2
    right = found.traces[None].points["layers.0.q_rope"].values
    wrong = trace(session_with(found.model, ["rope-theta"]), found.ids, "layers.0.q_rope").points["layers.0.q_rope"].values
    same = [np.array_equal(right[..., i], wrong[..., i]) and np.array_equal(right[..., i + half], wrong[..., i + half])
            for i in range(half)]  # fmt: skip
    assert same == [True] + [False] * (half - 1)


def test_dealt_heads_are_right_where_both_rules_agree(base: Callable[[str], Base]) -> None:
    found, point = base("gqa-modulo"), "layers.0.attn"
    config = found.model.config
    right = found.traces[None].points[point].values.reshape(len(found.ids), config.head_count, -1)
    wrong = trace(session_with(found.model, ["gqa-modulo"]), found.ids, point).points[point].values.reshape(right.shape)
    group, kv_heads = config.head_count // config.head_count_kv, config.head_count_kv
    for head in range(config.head_count):
        assert np.allclose(right[:, head], wrong[:, head], atol=1e-5) == (head // group == head % kv_heads)


def test_the_empty_cache_gives_a_token_its_own_value(base: Callable[[str], Base]) -> None:
    found = base("kv-empty")
    config = found.model.config
    seen = trace(session_with(found.model, ["kv-empty"]), found.ids, "layers.0.*", chunk=1).points
    own = np.repeat(seen["layers.0.v"].values, config.head_count // config.head_count_kv, axis=1)
    assert np.allclose(seen["layers.0.attn"].values, own.reshape(len(found.ids), -1), atol=1e-6)


def test_a_mismatched_key_is_never_a_hit(base: Callable[[str], Base]) -> None:
    found = base("cache-key-mismatch")
    session = session_with(found.model, ["cache-key-mismatch"])
    trace(session, found.ids, chunk=1)
    engine = session.engine
    assert isinstance(engine, naming.KeyMismatch)
    assert engine.hits == 0
    assert engine.misses == len(found.ids) * (7 * found.model.config.block_count + 1)


def test_mha_dims_contradict_the_shapes(model: Model, broken: Callable[[str], Path]) -> None:
    with pytest.raises(FormatError, match=r"attn_k.weight.*has shape \(64, 256\), the config demands \(256, 256\)"):
        session_with(model, ["mha-dims"])
    with pytest.raises(FormatError, match="the config demands"):
        Session(open_model(broken("mha-dims")))


def test_eight_bits_cost_per_cents_and_a_massive_channel_costs_the_rest() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 600)).astype(np.float32)
    x[1, :256] = 0
    rounded = q8_k(x)
    assert not rounded[1, :256].any()
    for start in (0, 256, 512):
        part, other = x[:, start : start + 256], rounded[:, start : start + 256]
        step = np.abs(part).max(axis=1, keepdims=True) / 127
        assert (np.abs(part - other) <= step * 0.5001).all()
    assert 0 < np.linalg.norm(x - rounded) / np.linalg.norm(x) < 0.02


def test_a_massive_channel_is_worse_in_the_last_layers_only(base: Callable[[str], Base]) -> None:
    found = base("massive-channel")
    last = found.model.config.block_count - 1
    assert last >= found.model.config.block_count * 7 // 8

    def error(id: str, layer: int) -> float:
        point = f"layers.{layer}.gate"
        right = found.traces[None].points[point].values
        wrong = trace(session_with(found.model, [id]), found.ids, point).points[point].values
        return float(np.linalg.norm(right - wrong) / np.linalg.norm(right))

    assert error("massive-channel", 1) == error("q8-activations", 1) < 0.1
    assert error("massive-channel", last) > 3 * error("q8-activations", last)


@pytest.mark.parametrize(
    ("logits", "chosen"),
    [([1, 5, 2], 1), ([5, 1, 5], 2), ([np.nan] * 4, 3), ([9, np.nan, 1, 3, 2], 3), ([9, 1, np.nan], 2), ([np.inf, 1], 0)],
)
def test_the_maximum_for_which_nan_equals_everything(logits: list[float], chosen: int) -> None:
    current = 0  # Rust's max_by, word for word: the later of equals wins
    for i, x in enumerate(logits):
        if not x < logits[current]:
            current = i
    assert last_of_equals(np.array(logits, np.float32)) == current == chosen


def test_a_file_that_cannot_be_opened_is_refused_in_a_session(model: Model) -> None:
    with pytest.raises(FormatError, match="historic naming 'bare'"):
        session_with(model, ["GH-190"])


@pytest.mark.parametrize("id", sorted(set(FIRST) & set(file_faults()) - {"cache-key-mismatch"}))
def test_both_forms_of_a_fault_give_the_same_logits(id: str, base: Callable[[str], Base], broken: Callable[[str], Path]) -> None:
    found = base(id)
    as_run = trace(session_with(found.model, [id]), found.ids, "logits").points["logits"].values
    as_file = trace(Session(open_model(broken(id))), found.ids, "logits").points["logits"].values
    assert np.array_equal(as_run, as_file)


@pytest.mark.parametrize("id", ["q4k-one-scale", "default-kernel", "lost-qkv-biases", "gqa-modulo", "kv-twice", "rope-norm"])
def test_faults_mean_the_same_on_another_engine(id: str, base: Callable[[str], Base]) -> None:
    pytest.importorskip("aprlab.engines.jit")
    found = base(id)
    points = ("layers.0.q", "layers.0.v", "layers.0.attn")
    here = trace(session_with(found.model, [id]), found.ids, points, chunk=1)
    there = trace(session_with(found.model, [id], engine="jit", threads=1), found.ids, points, chunk=1)
    for point in points:
        x, y = here.points[point].values, there.points[point].values
        finite = np.isfinite(x)
        assert np.allclose(x[finite], y[finite], atol=2e-4 * np.abs(x[finite]).max(initial=1))


def test_a_stale_cache_begins_after_an_older_prompt(model: Model) -> None:
    session = session_with(model, ["kv-stale"])
    assert isinstance(session.engine, KvStale)
    cache = session.engine.new_cache(model.config, 8)
    assert cache.positions(2).tolist() == [5, 6]


def test_a_sequence_fed_again_is_the_same_as_a_longer_prompt(model: Model) -> None:
    """Step by step: prompt, then prompt and prompt with one token more, and so on, one behind the other."""
    healthy, refed = session_with(model, []), session_with(model, ["kv-refed"])
    ids = healthy.prompt_tokens(QUESTION)
    said = refed.generate(ids, max_tokens=4, keep_logits=True)
    assert said.logits is not None
    seen: list[int] = []
    for step, logits in enumerate(said.logits):
        seen += [*ids, *said.tokens[:step]]
        alone = healthy.generate(seen, max_tokens=1, keep_logits=True).logits
        assert alone is not None
        assert np.allclose(logits, alone[0], atol=1e-4 * np.abs(alone).max())
    fresh = session_with(model, [])  # the other one has parts of the prompt in its cache, and so another last bit
    plain = fresh.generate(ids, max_tokens=4, keep_logits=True).logits
    assert plain is not None
    assert np.array_equal(said.logits[0], plain[0])
    assert not np.allclose(said.logits[1], plain[1], atol=1e-3)
    assert refed.generate(ids, max_tokens=4).tokens == said.tokens  # a second question finds no trace of the first
    assert len(refed.generate("What is 2+2?", max_tokens=60).tokens) <= 60  # the cache runs full and is emptied


def test_slot_zero_shows_in_the_first_step_after_the_prompt(model: Model) -> None:
    healthy, broken = session_with(model, []), session_with(model, ["kv-slot-zero"])
    ids = healthy.prompt_tokens(QUESTION)
    right, wrong = (s.generate(ids, max_tokens=2, keep_logits=True).logits for s in (healthy, broken))
    assert right is not None
    assert wrong is not None
    assert np.allclose(right[0], wrong[0], atol=1e-5 * np.abs(right[0]).max())
    assert not np.allclose(right[1], wrong[1], atol=1e-2 * np.abs(right[1]).max())


def test_the_numbers_of_small_formats() -> None:
    x = np.array([0, 1, 1.06, 1.07, 447, 449, 1000, -500, 2.0**-9, 2.0**-11, 0.3], np.float32)
    assert e4m3(x).tolist() == [0, 1, 1, 1.125, 448, 448, 448, -448, 2.0**-9, 0, 0.3125]
    keys = np.random.default_rng(0).normal(size=(3, 2, 64)).astype(np.float32)
    keys[..., 5] += 300  # a bias that uses up the range of its group
    wrong = four_bits(keys)
    assert (np.abs(wrong - keys)[..., 32:] < 0.3).all()
    assert np.abs(wrong - keys)[..., :32].mean() > 0.5
    assert np.array_equal(four_bits(np.ones((2, 64), np.float32)), np.ones((2, 64)))


def test_scores_beyond_float16_are_not_numbers(model: Model) -> None:
    """What float32 survives: products above 65504, as Qwen2's biased keys have them."""
    engine = session_with(model, ["kq-fp16"]).engine
    assert isinstance(engine, PlainAttention)
    config, positions = model.config, np.arange(2)
    for size, finite in ((10.0, True), (100.0, False)):
        q = np.full((2, config.head_count, config.head_dim), size, np.float32)
        k = np.full((2, config.head_count_kv, config.head_dim), size, np.float32)
        with np.errstate(all="ignore"):
            out = engine.attend(q, k, k, engine.new_cache(config, 4), 0, positions)
        assert np.isfinite(out).all() == finite


def test_nan_through_top_k_is_one_letter(model: Model) -> None:
    assert session_with(model, ["nan-sampled"]).generate(QUESTION, max_tokens=3).tokens == [39, 39, 39]


def test_the_last_token_twice_is_a_longer_prompt(model: Model) -> None:
    healthy, broken = session_with(model, []), session_with(model, ["last-token-twice"])
    ids = healthy.prompt_tokens(QUESTION)
    for _ in range(2):  # the second time from the cache
        said = broken.generate(ids, max_tokens=3, keep_logits=True).logits
        meant = healthy.generate([*ids, ids[-1]], max_tokens=3, keep_logits=True).logits
        plain = healthy.generate(ids, max_tokens=3, keep_logits=True).logits
        assert said is not None
        assert meant is not None
        assert plain is not None
        assert np.allclose(said[0], meant[0], atol=1e-4 * np.abs(meant).max())
        assert not np.allclose(said[0], plain[0], atol=1e-3)


def test_a_lost_prompt_is_one_token_whatever_was_asked(model: Model) -> None:
    session = session_with(model, ["prompt-lost"])
    assert session.prompt_tokens(QUESTION) == session.prompt_tokens("Something else") == [1]
    assert session.tokenizer.decode(session_with(model, []).prompt_tokens("4", raw=True)) == "4"


@pytest.mark.parametrize("fault", ["kv-twice", "kv-stale"])
def test_faults_of_the_cache_work_where_arrays_are_not_numpys(fault: str) -> None:
    """The arrays of kernel engines take no assignment: what a fault begins with has to be made by the engine."""
    model = random_model(config=replace(CONFIG, block_count=1))
    said = [session_with(model, [fault], engine).generate([1, 2, 3], max_tokens=2).tokens for engine in ("reference", "ptx")]
    assert said[0] == said[1]
