"""Qwen3, Llama and scaled rotation through every format and back: names, keys, rows of Q and K, scaling, tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import CONFIG
from made import bpe_data, made_model, pieces_data, write_gguf

from aprlab.conversion import convert, export
from aprlab.errors import AprlabError
from aprlab.formats import gguf, open_model
from aprlab.inference import Session
from aprlab.model.model import Model
from aprlab.model.rope import FACTORS, RopeScaling, llama3_factors
from aprlab.model.row_order import as_halves, as_pairs
from aprlab.quants import types

SMALL = replace(CONFIG, block_count=2)
LLAMA = replace(SMALL, architecture="llama", rope_type="norm", rope_theta=500_000.0)
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = RopeScaling("yarn", 4.0, original_context=16)


def llama3() -> Model:
    """A Llama 3 whose factors are those of its published scaling."""
    config = replace(LLAMA, rope_factors=True, tied_embeddings=True)
    model = made_model(config, bpe_data("llama-bpe"))
    factors = llama3_factors(LLAMA3, config.rope_theta, config.head_dim)
    model.tensors[FACTORS] = model.tensors[FACTORS].replace(raw=factors.view(np.uint8))
    return model


MADE: dict[str, Any] = {
    "qwen3": lambda: made_model(replace(SMALL, architecture="qwen3"), bpe_data("qwen2")),
    "llama 3": llama3,
    "smollm": lambda: made_model(LLAMA, bpe_data("smollm")),
    "qwen2, yarn": lambda: made_model(replace(SMALL, rope_scaling=YARN)),
    "qwen2, yarn, more": lambda: made_model(replace(SMALL, rope_scaling=replace(YARN, attention_factor=1.25, beta_slow=2.0))),
    "qwen2, linear": lambda: made_model(replace(SMALL, rope_scaling=RopeScaling("linear", 3.0))),
    "mistral": lambda: made_model(replace(LLAMA, sliding_window=5), bpe_data("tekken")),
    "qwen2, window": lambda: made_model(replace(SMALL, sliding_window=5)),
    "llama 2": lambda: made_model(replace(LLAMA, rope_theta=10_000.0), pieces_data()),
}  # fmt: skip
FOR_HUGGING_FACE = [what for what in MADE if what != "llama 2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    return {what: write_gguf(make(), folder / f"{n}.gguf") for n, (what, make) in enumerate(MADE.items())}


def answers(path: Path, text: str = "hello world, 1234!") -> tuple[list[int], list[int], np.ndarray]:
    session = Session(open_model(path))
    ids = session.raw_tokens(text)
    done = session.generate(ids, max_tokens=4, keep_logits=True)
    assert done.logits is not None
    return ids, done.tokens, done.logits


def alike(a: Path, b: Path) -> None:
    for x, y in zip(answers(a), answers(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("what", MADE)
@pytest.mark.parametrize("dialect", ["aprender", "realizar"])
def test_gguf_to_apr_and_back_is_the_same_file(files: dict[str, Path], tmp_path: Path, what: str, dialect: str) -> None:
    convert(files[what], tmp_path / "m.apr", dialect=dialect)
    there, here = open_model(tmp_path / "m.apr"), open_model(files[what])
    assert there.config == here.config
    assert there.tokenizer == here.tokenizer
    alike(files[what], tmp_path / "m.apr")
    export(tmp_path / "m.apr", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == files[what].read_bytes()


@pytest.mark.parametrize("what", FOR_HUGGING_FACE)
def test_by_hugging_face_to_gguf_nothing_is_lost(files: dict[str, Path], tmp_path: Path, what: str) -> None:
    """GGUF -> SafeTensors -> GGUF: config, tensors, ids, logits. What the folder itself says is tested below."""
    export(files[what], tmp_path / "hf", format="safetensors")
    folder, here = open_model(tmp_path / "hf"), open_model(files[what])
    assert folder.config == here.config
    convert(tmp_path / "hf", tmp_path / "back.gguf")
    back = open_model(tmp_path / "back.gguf")
    assert back.config == here.config
    assert back.tensors.keys() == here.tensors.keys()
    for name, tensor in here.tensors.items():
        assert np.array_equal(back.tensors[name].raw, tensor.raw), name
    alike(files[what], tmp_path / "hf")
    alike(files[what], tmp_path / "back.gguf")


def test_what_cannot_be_said_there_is_refused_by_name(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AprlabError, match="tokenizer 'llama' with pre-tokeniser 'default'"):
        export(files["llama 2"], tmp_path / "hf", format="safetensors")
    odd = made_model(replace(LLAMA, rope_factors=True), bpe_data("llama-bpe"))  # factors that no published scaling gives
    with pytest.raises(AprlabError, match="not what a published scaling of Llama 3 gives"):
        export(odd, tmp_path / "hf", format="safetensors")
    assert not (tmp_path / "hf").exists()


# ── rows of Q and K ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_orders_of_rows_are_each_others_inverse() -> None:
    pairs, halves = as_pairs(3, 8), as_halves(3, 8)
    assert pairs.tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(pairs[halves], np.arange(24))
    assert np.array_equal(halves[pairs], np.arange(24))


def test_llamas_rows_are_in_hugging_faces_order_there(files: dict[str, Path], tmp_path: Path) -> None:
    """As llama.cpp's `LlamaModel.permute` has it: view(heads, 2, D/2, cols), swap the middle two, flatten."""
    from safetensors.numpy import load_file

    export(files["smollm"], tmp_path / "hf", format="safetensors")
    stored, here = load_file(tmp_path / "hf" / "model.safetensors"), open_model(files["smollm"])
    for short, heads in (("q", LLAMA.head_count), ("k", LLAMA.head_count_kv)):
        there = stored[f"model.layers.1.self_attn.{short}_proj.weight"]
        permuted = there.reshape(heads, 2, -1, there.shape[1]).swapaxes(1, 2).reshape(there.shape)
        mine = here.tensor(f"blk.1.attn_{short}.weight").dequantise()
        assert np.array_equal(permuted, mine)
        assert not np.array_equal(there, mine)
    assert np.array_equal(stored["model.layers.1.self_attn.v_proj.weight"], here.tensor("blk.1.attn_v.weight").dequantise())


def test_a_row_order_is_read_in_any_parts(files: dict[str, Path], tmp_path: Path) -> None:
    export(files["smollm"], tmp_path / "hf", format="safetensors")
    tensor = open_model(tmp_path / "hf").tensor("blk.0.attn_q.weight")
    whole = tensor.raw
    for start, stop in ((0, 10), (1000, 1030), (1023, 5000), (tensor.nbytes - 3, tensor.nbytes), (7, 7)):
        assert np.array_equal(tensor.content.read(start, stop), whole[start:stop])
    rows = np.array([5, 0, 17])
    assert np.array_equal(tensor.dequantise(rows), tensor.dequantise()[rows])


# ── rope_scaling in config.json ───────────────────────────────────────────────────────────────────────────────────


def test_config_json_says_the_scaling(files: dict[str, Path], tmp_path: Path) -> None:
    said = {}
    for what in FOR_HUGGING_FACE:
        export(files[what], tmp_path / what, format="safetensors")
        said[what] = json.loads((tmp_path / what / "config.json").read_text()).get("rope_scaling")
    assert said["qwen3"] is said["smollm"] is None
    assert said["llama 3"] == {"rope_type": "llama3", **LLAMA3}
    assert said["qwen2, linear"] == {"rope_type": "linear", "type": "linear", "factor": 3.0}
    assert said["qwen2, yarn"] == {
        "rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16
    }  # fmt: skip
    assert said["qwen2, yarn, more"]["attention_factor"] == pytest.approx(1.25 * (1 + 0.1 * np.log(4)))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [({"type": "dynamic", "factor": 2.0}, "'dynamic'"), ({"type": "longrope"}, "'longrope'"), ({"type": "yarn"}, "factor"),
     ({"type": "linear", "factor": 0.5}, "out of range"), ({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}, "mscale"),
     ({"rope_type": "llama3", **LLAMA3}, "divided by a factor of its own"), ([1], "not an object")],
)  # fmt: skip
def test_a_scaling_that_is_not_handled_is_refused_by_name(
    files: dict[str, Path], tmp_path: Path, scaling: Any, message: str
) -> None:
    export(files["qwen2, linear"], tmp_path / "hf", format="safetensors")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    with pytest.raises(AprlabError, match=message):
        open_model(tmp_path / "hf").config  # noqa: B018


def test_mistral_is_a_llama_without_a_window(files: dict[str, Path], tmp_path: Path) -> None:
    export(files["smollm"], tmp_path / "hf", format="safetensors")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": None}
    path.write_text(json.dumps(config))
    assert open_model(tmp_path / "hf").config.architecture == "llama"
    alike(tmp_path / "hf", files["smollm"])
    path.write_text(json.dumps(config | {"sliding_window": 64}))
    assert open_model(tmp_path / "hf").config.sliding_window == 64
    path.write_text(json.dumps(config | {"sliding_window": "wide"}))
    with pytest.raises(AprlabError, match=r"sliding_window is 'wide'"):
        open_model(tmp_path / "hf").config  # noqa: B018


def test_a_llama_2_without_a_rotary_base_has_llamas(files: dict[str, Path], tmp_path: Path) -> None:
    """Llama 2's files do not say 10,000; a Qwen2 that does not say its base is warned of."""
    data = pieces_data()
    path = write_gguf(made_model(replace(LLAMA, rope_theta=10_000.0), data), tmp_path / "m.gguf", drop=("llama.rope.freq_base",))
    assert open_model(path).config.rope_theta == 10_000.0
    alike(path, files["llama 2"])
    path = write_gguf(made_model(SMALL), tmp_path / "q.gguf", drop=("qwen2.rope.freq_base",))
    assert open_model(path).config.rope_theta == 10_000.0
    assert any("qwen2.rope.freq_base" in note for note in open_model(path).warnings)


def test_gguf_to_gguf_requantised_keeps_keys_and_norms(files: dict[str, Path], tmp_path: Path) -> None:
    for what in ("qwen3", "llama 3", "qwen2, yarn"):
        convert(files[what], tmp_path / "q.gguf", quantize="q8_0", force=True)
        a, b = open_model(files[what]), open_model(tmp_path / "q.gguf")
        assert a.config == b.config
        assert {t.type for n, t in b.tensors.items() if len(t.shape) == 1} == {types.F32}
        assert {t.type for n, t in b.tensors.items() if len(t.shape) == 2} == {types.Q8_0}
        assert gguf.read_header(files[what]).fields.keys() == gguf.read_header(tmp_path / "q.gguf").fields.keys()
