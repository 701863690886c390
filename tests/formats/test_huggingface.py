"""Hugging Face directories: the same model, shards, companions that are broken or missing; transformers reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import shard

from aprlab import paths, quants
from aprlab.conversion.converter import convert, export
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.formats import huggingface_files, huggingface_tokenizer, identify, open_model
from aprlab.inference.session import Session
from aprlab.published import ANSWER, QUESTION
from aprlab.quants import types

DTYPES = {"f32": types.F32, "f16": types.F16, "bf16": types.BF16}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(folders["bf16"], tmp_path / "hf"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value if (changed := change(value)) is None else changed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_directory_is_the_same_model(dtype: str, tiny: Path, folders: dict[str, Path]) -> None:
    source, model = open_model(tiny), open_model(folders[dtype])
    assert (model.config, model.tokenizer) == (source.config, source.tokenizer)
    assert model.format == "safetensors" and model.by_type() == {DTYPES[dtype].name: len(source.tensors)}
    for name, tensor in source.tensors.items():
        due = quants.dequantise(quants.quantise(tensor.dequantise(), DTYPES[dtype]), DTYPES[dtype], tensor.shape)
        np.testing.assert_array_equal(model.tensor(name).dequantise(), due)
    alone = open_model(folders[dtype] / "model.safetensors")
    assert (alone.config, alone.tokenizer) == (source.config, source.tokenizer)
    if dtype == "bf16":  # the coarsest
        assert Session(model).generate(QUESTION).text == ANSWER


def test_the_report_states_the_cost(tiny: Path, tmp_path: Path) -> None:
    source = open_model(tiny)
    for dtype, kind in DTYPES.items():
        report = export(tiny, tmp_path / dtype, format="safetensors", dtype=dtype)
        after = open_model(tmp_path / dtype)
        assert sum(cost.tensors for cost in report.costs) == sum(t.type is not kind for t in source.tensors.values())
        for cost in report.costs:
            pairs = [(t.dequantise().ravel(), after.tensor(n).dequantise().ravel())
                     for n, t in source.tensors.items() if t.type.name == cost.type_in]  # fmt: skip
            x, y = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
            assert cost.tensors == len(pairs) and cost.worst == np.abs(x - y).max()
            np.testing.assert_allclose(cost.relative, np.linalg.norm(x - y) / np.linalg.norm(x), rtol=1e-9)
        exact = dtype == "f32"
        assert all((cost.relative == 0) == exact for cost in report.costs)
        assert all(("no value changed" in note) == exact for note in report.notes)
        half_a_unit = {"f32": 0.0, "f16": 2**-12, "bf16": 2**-9}[dtype]  # of the last bit of the mantissa, relative
        assert all(cost.relative <= half_a_unit for cost in report.costs)


def test_the_tokenizer_file_is_one(tiny: Path, folders: dict[str, Path]) -> None:
    from tokenizers import Tokenizer

    from aprlab.gates import PROBES
    from aprlab.inference.tokenizer import Qwen2Tokenizer

    theirs = Tokenizer.from_file(str(folders["f32"] / "tokenizer.json"))
    ours = Qwen2Tokenizer(open_model(tiny).tokenizer)
    for text in (*PROBES, "<|im_start|>user\nhi<|im_end|>"):
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text) and theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab_size() == 835  # without the five that only pad


def test_shards_are_one_model(folder: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    shard(folder)
    model, whole = open_model(folder), open_model(folders["bf16"])
    assert model.dialect == "hugging face in 3 shards" and model.tensors.keys() == whole.tensors.keys()
    assert all(np.array_equal(t.raw, whole.tensor(n).raw) for n, t in model.tensors.items())
    for source, out in ((folder, "a.apr"), (folders["bf16"], "b.apr")):
        convert(source, tmp_path / out)
    a, b = open_model(tmp_path / "a.apr"), open_model(tmp_path / "b.apr")
    assert all(np.array_equal(t.raw, b.tensor(n).raw) for n, t in a.tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"lm_head.weight": "../../outside.safetensors"}), "not a file next to it"),
        (lambda m: m.update({"lm_head.weight": ".."}), "not a file next to it"),
        (lambda m: m.update({"lm_head.weight": "model-00002-of-00003.safetensors"}), "lm_head"),
        (lambda m: m.update({"lm_head.weight": "gone.safetensors"}), "No such file"),
        (lambda m: m.pop("lm_head.weight"), "does not give it to this file"),
        (lambda m: m.update({"lm_head.weight": 3}), "not a map"),
        (lambda m: m.clear(), "not a map"),
    ],
)
def test_an_index_that_lies(change: Callable[[dict[str, Any]], Any], message: str, folder: Path) -> None:
    shard(folder)
    rewrite(folder / "model.safetensors.index.json", lambda v: change(v["weight_map"]) and None)
    with pytest.raises(AprlabError, match=message):
        open_model(folder)


def test_tied_embeddings(tiny: Path, tmp_path: Path) -> None:
    """Without an output.weight the flag says so, and comes back; a copy that the flag ties is left out, another one refused."""
    from dataclasses import replace

    model = open_model(tiny)
    config = replace(model.config, tied_embeddings=True)
    rest = {n: t for n, t in model.tensors.items() if n != "output.weight"}
    export(replace(model, tensors=rest, make_config=lambda: config), tmp_path / "tied", format="safetensors", dtype="bf16")
    tied = open_model(tmp_path / "tied")
    assert tied.config == config and "output.weight" not in tied.tensors
    convert(tmp_path / "tied", tmp_path / "tied.gguf")
    back = open_model(tmp_path / "tied.gguf")
    assert back.config == config and "output.weight" not in back.tensors

    export(tiny, tmp_path / "own", format="safetensors", dtype="bf16")
    rewrite(tmp_path / "own" / "config.json", lambda c: c.update(tie_word_embeddings=True))
    with pytest.raises(FormatError, match=r"lm_head\.weight differs"):
        open_model(tmp_path / "own")
    double = {**rest, "output.weight": rest["token_embd.weight"].replace(name="output.weight")}
    export(replace(model, tensors=double), tmp_path / "copy", format="safetensors", dtype="bf16")
    rewrite(tmp_path / "copy" / "config.json", lambda c: c.update(tie_word_embeddings=True))
    copy = open_model(tmp_path / "copy")
    assert copy.config.tied_embeddings and "copy of the embedding" in copy.warnings[0]
    rewrite(tmp_path / "tied" / "config.json", lambda c: c.update(tie_word_embeddings=False))
    with pytest.raises(FormatError, match=r"there is no lm_head\.weight"):
        open_model(tmp_path / "tied")


BAD_FILES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("config.json", lambda c: c.pop("rope_theta"), "has no 'rope_theta'"),
    ("config.json", lambda c: c.pop("num_key_value_heads"), "has no 'num_key_value_heads'"),
    ("config.json", lambda c: c.update(model_type="gemma"), "architecture 'gemma'"),
    ("config.json", lambda c: c.update(hidden_size=512), "config.json says"),
    ("config.json", lambda c: c.update(hidden_size="256"), "'hidden_size' is '256'"),
    ("config.json", lambda c: c.update(num_hidden_layers=True), "'num_hidden_layers' is True"),
    ("config.json", lambda c: c.update(rope_scaling={"type": "dynamic", "factor": 4.0}), "rotary scaling 'dynamic'"),
    ("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"}), "quantization_config"),
    (
        "config.json", lambda c: c.update(use_sliding_window=True, sliding_window=64, max_window_layers=2),
        "'max_window_layers' is 2",
    ),
    ("config.json", lambda c: c.update(sliding_window=-1, use_sliding_window=None), "sliding_window is -1"),
    ("config.json", lambda c: c.update(layer_types=["sliding_attention"]), "'layer_types'"),
    (
        "config.json",
        lambda c: c.update(dual_chunk_attention_config={"chunk_size": 64, "original_max_position_embeddings": 128}),
        "'dual_chunk_attention_config' is 128: beyond so many positions attention is in chunks",
    ),
    ("config.json", lambda c: c.update(tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
    ("config.json", lambda c: [c], "not an object"),
    ("config.json", lambda c: c.update(rope_theta=10**400), "more than a float32 can hold"),
    ("config.json", lambda c: c.update(num_hidden_layers=2**31 - 1), "at most 10000"),
    ("tokenizer.json", lambda t: t.pop("model"), "has no model"),
    ("tokenizer.json", lambda t: t["model"].update(type="Unigram"), "not plain byte-level BPE"),
    ("tokenizer.json", lambda t: t["model"].update(merges=["a b c"]), "not a pair"),
    ("tokenizer.json", lambda t: t["model"]["vocab"].update({"zz": 3}), "have the same id"),
    ("tokenizer.json", lambda t: t["model"]["vocab"].update({"zz": 10**6}), "has no row"),
    ("tokenizer.json", lambda t: t.update(normalizer=None), "qwen2 has NFC"),
    ("tokenizer.json", lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0), "is not one that is known"),
    ("tokenizer.json", lambda t: t["added_tokens"][0].update(id="7"), "added_tokens holds"),
    ("tokenizer.json", lambda t: t["added_tokens"][0].update(lstrip=True), "strips"),
    ("tokenizer_config.json", lambda t: t.update(eos_token="<|nothing|>"), "is not a token"),
    ("tokenizer_config.json", lambda t: t.update(chat_template=7), "not text"),
    ("tokenizer_config.json", lambda t: t.update(eos_token=["<|im_end|>"]), "is not a token"),
]


@pytest.mark.parametrize(("file", "change", "message"), BAD_FILES, ids=[f"{f}: {m}" for f, _, m in BAD_FILES])
def test_a_broken_companion_is_named(file: str, change: Callable[[dict[str, Any]], Any], message: str, folder: Path) -> None:
    def apply(value: dict[str, Any]) -> Any:
        done = change(value)
        return done if isinstance(done, list) else None

    rewrite(folder / file, apply)
    with pytest.raises(AprlabError, match=message) as caught:
        model = open_model(folder)
        assert model.config and model.tokenizer
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("method", "name"), [("gptq", "GPTQ"), ("bitsandbytes", "bitsandbytes"), ("exl3", "exl3")])
def test_a_checkpoint_of_another_quantiser_is_named_before_its_dtypes(folder: Path, method: str, name: str) -> None:
    """Its integers are met first where the weights are read; what they are is said by config.json."""
    entry = {"model.layers.0.self_attn.q_proj.qweight": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}
    text = json.dumps(entry).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    rewrite(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": method, "bits": 4}))
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(AprlabError, match=rf"quantised by {name} .*; give the checkpoint that it was made of, or") as caught:
            open_model(path)
        assert caught.value.code == "identity.quantised-checkpoint"
    assert identify(folder).code == "identity.quantised-checkpoint"


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.json: is missing"):
        assert open_model(folder).tokenizer
    (folder / "config.json").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="not UTF-8"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json: is missing"):
        open_model(folder / "model.safetensors")
    with pytest.raises(UsageError, match="is a directory, not a model file"):
        open_model(tmp_path)


def test_a_template_is_text_of_some_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / huggingface_files.TEMPLATE).write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(FormatError, match=r"chat_template\.jinja.*not UTF-8"):
        assert huggingface_tokenizer._chat_template(folder, {})
    monkeypatch.setattr(huggingface_files, "JSON_LIMIT", 4)
    with pytest.raises(FormatError, match="at most 4 are read"):
        assert huggingface_tokenizer._chat_template(folder, {})


def test_rows_are_the_embeddings_alone(folder: Path) -> None:
    with pytest.raises(FormatError, match=r"no tensor 'model\.embed_tokens\.weight'"):
        huggingface_tokenizer.tokenizer(folder, {"vocab_size": 2**60}, {})


def test_an_id_outside_the_vocabulary_is_one_line(folder: Path, tmp_path: Path) -> None:
    rewrite(folder / "tokenizer_config.json", lambda t: t.update(eos_token=None))
    rewrite(folder / "config.json", lambda c: c.update(eos_token_id=10**6))
    with pytest.raises(FormatError, match="the eos token 1000000 is outside the vocabulary"):
        export(folder, tmp_path / "out", format="safetensors")


def test_nothing_that_is_read_is_written_to(folder: Path, tiny: Path, tmp_path: Path) -> None:
    (folder / huggingface_files.TEMPLATE).write_text("hello")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", huggingface_files.TEMPLATE):
        for source in (folder, folder / "model.safetensors"):
            for action in (convert, export):
                with pytest.raises(UsageError, match="same file"):
                    action(source, folder / name, force=True)
    # a folder of links, as the hub's cache has them
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in before:
        (snapshot / name).symlink_to(folder / name)
    (snapshot / huggingface_files.TEMPLATE).unlink()
    for source in (snapshot, snapshot / "model.safetensors"):
        with pytest.raises(UsageError, match="holds the input"):
            export(source, snapshot, format="safetensors", force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_spellings_of_the_hub(folder: Path) -> None:
    """Merges as pairs, the template in its own file, several templates, ids as a list, rope in its newer place."""
    before = open_model(folder)
    config, tok = before.config, before.tokenizer
    rewrite(folder / "tokenizer.json", lambda t: t["model"].update(merges=[m.split(" ") for m in t["model"]["merges"]]))
    rope = {"rope_type": "default", "rope_theta": 1e6}
    rewrite(folder / "config.json", lambda c: c.update(rope_parameters=rope, rope_theta=None))
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": tok.chat_template}]
    rewrite(folder / "tokenizer_config.json", lambda t: t.update(chat_template=named, eos_token={"content": t["eos_token"]}))
    after = open_model(folder)
    assert (after.config, after.tokenizer) == (config, tok)
    (folder / "chat_template.jinja").write_text("own file", encoding="utf-8")
    rewrite(folder / "tokenizer_config.json", lambda t: t.pop("eos_token") and None)
    rewrite(folder / "config.json", lambda c: c.update(eos_token_id=[834, 832]))
    after = open_model(folder)
    assert after.tokenizer.chat_template == "own file" and after.tokenizer.eos_token_id == 834


@pytest.mark.peer
def test_transformers_reads_config_tokenizer_and_template(folders: dict[str, Path]) -> None:
    """What of transformers needs no PyTorch: every number of the config, and the prompt's ids."""
    transformers = pytest.importorskip("transformers")
    found = transformers.AutoConfig.from_pretrained(folders["f32"])
    config = open_model(paths.embedded_model()).config
    assert found.model_type == "qwen2"
    assert (found.hidden_size, found.intermediate_size) == (config.embedding_length, config.feed_forward_length)
    assert (found.num_attention_heads, found.num_key_value_heads) == (config.head_count, config.head_count_kv)
    assert (found.num_hidden_layers, found.vocab_size) == (config.block_count, config.vocab_size)
    assert found.rms_norm_eps == pytest.approx(config.rms_norm_eps)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["f32"])
    session = Session(open_model(paths.embedded_model()))
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text)["input_ids"] == session.chat_tokens(QUESTION)
    assert tokenizer.decode(session.tokenizer.encode("naïve 2+2"), skip_special_tokens=True) == "naïve 2+2"


@pytest.mark.peer
def test_transformers_gives_the_same_tokens(folders: dict[str, Path]) -> None:
    """transformers in float32 on the exported directory: prompt ids and greedy answer of our engine."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["f32"])
    network, info = transformers.AutoModelForCausalLM.from_pretrained(folders["f32"], output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    session = Session(open_model(paths.embedded_model()))
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert ids == session.chat_tokens(QUESTION)
    answer = session.generate(QUESTION, keep_logits=True)
    out = network.generate(torch.tensor([ids]), max_new_tokens=64)[0].tolist()[len(ids) :]
    assert tokenizer.decode(out, skip_special_tokens=True) == answer.text == ANSWER
    logits = network(torch.tensor([ids])).logits[0, -1].detach().numpy()
    assert answer.logits is not None
    np.testing.assert_allclose(logits, answer.logits[0], atol=2e-3)
