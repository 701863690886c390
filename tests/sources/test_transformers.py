"""transformers by hooks: every point, three types, two kinds of attention, other architectures, injection; faults by patching."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import first_layers

from aprlab.errors import AprlabError
from aprlab.formats import open_model
from aprlab.model.model import Model
from aprlab.onion.foreign_shadow import Judges, distance, shadow_of
from aprlab.onion.source_peeling import peel_sources
from aprlab.sources import source
from aprlab.tracing.traces import Point

DATA = Path(__file__).parents[1] / "data"
TOKENS, PROMPT = [5, 9, 30, 77, 41, 8, 200, 31], 6

try:
    import torch
    import transformers
except ImportError as error:
    why = f"needs pip install 'aprlab[torch]': {error}"
    torch = transformers = None
live_only = pytest.mark.skipif(torch is None, reason="" if torch is not None else why)


# ── recorded, without torch ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def one_layer(tiny: Path) -> Model:
    """What docs/make/transformers_record.py ran."""
    return first_layers(open_model(tiny), 1)


@pytest.mark.parametrize("name", ["bf16", "bf16-sdpa"])
def test_a_recorded_trace_is_within_its_contract(one_layer: Model, name: str) -> None:
    with source(str(DATA / f"transformers-{name}.npz"), one_layer) as kept:
        assert kept.name == "transformers" and "values bf16" in str(kept.contract)
        trace = kept.run(*kept.recorded[:1])
    operations = shadow_of(trace, Judges(one_layer, kept.contract), one_layer.config)
    assert len(operations) == len(trace.points) == (6 if "sdpa" in name else 18)
    assert [o.point for o in operations if not o.fits] == []
    if "sdpa" not in name:  # torch's separate operations round as the contract says: bit for bit, but for the order of sums
        assert np.mean([float(np.median(o.off)) == 0 for o in operations]) > 0.7
    verdict = peel_sources(one_layer, [str(DATA / f"transformers-{name}.npz")], prompt=[1])
    assert (verdict.verdict, verdict.findings) == ("equivalent", [])


def test_a_recorded_trace_under_another_contract_is_not(one_layer: Model) -> None:
    kept = source(str(DATA / "transformers-bf16.npz"), one_layer)
    trace = kept.run(*kept.recorded[:1])
    exact = shadow_of(trace, Judges(one_layer, type(kept.contract)()), one_layer.config)
    assert sum(not o.fits for o in exact) > 10


def test_a_recorded_fault_is_named(one_layer: Model) -> None:
    verdict = peel_sources(one_layer, [str(DATA / "transformers-theta.npz")], prompt=[1])
    assert (verdict.verdict, verdict.faults) == ("broken", ["rope-theta"])
    assert verdict.first_divergence is not None and verdict.first_divergence["point"] == "layers.0.q_rope"


def test_without_torch_one_line_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(AprlabError) as caught:
        source("transformers", tiny)
    assert caught.value.code == "source.torch-missing" and "aprlab[torch]" in str(caught.value)


@pytest.mark.parametrize("options", ["dtype=f64", "attention=magic", "heat=1"])
def test_unknown_options_are_refused(tiny: Path, options: str) -> None:
    with pytest.raises(AprlabError) as caught:
        source(f"transformers,{options}", tiny)
    assert caught.value.code in ("source.bad-option", "source.unknown-option")


# ── live ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the embedded model as transformers has them."""
    from variants import shallow

    from aprlab.conversion.converter import export

    root = tmp_path_factory.mktemp("transformers")
    export(shallow(tiny, root / "two.gguf", 2), root / "f32", format="safetensors", dtype="f32")
    return root / "f32"


@live_only
def test_every_point_is_the_reference_engines(folder: Path) -> None:
    model = open_model(folder)
    with source(f"transformers,folder={folder}", model) as theirs, source("reference", model) as ours:
        a, b = theirs.run(TOKENS, prompt=PROMPT), ours.run(TOKENS, prompt=PROMPT)
    assert set(a.points) == set(b.points)
    worst = max(float(distance(a[p].values, b[p].values, b[p].values).max()) for p in b)
    assert worst < 1e-4


@live_only
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_false_alarm(folder: Path, dtype: str, attention: str) -> None:
    model = open_model(folder)
    verdict = peel_sources(model, [f"transformers,folder={folder},dtype={dtype},attention={attention}"], prompt="Hi")
    assert (verdict.verdict, verdict.findings) == ("equivalent", [])


@live_only
def test_its_own_gguf_loader_is_a_source(folder: Path) -> None:
    verdict = peel_sources(folder.parent / "two.gguf", ["transformers"], prompt="Hi")
    assert (verdict.verdict, verdict.findings) == ("equivalent", [])


@live_only
def test_a_dump_of_torch_is_read_by_its_safe_loader_alone(folder: Path, tmp_path: Path) -> None:
    model = open_model(folder)
    with source("reference", model) as ours:
        healthy = ours.run(TOKENS)
    mapping = f"arrays: WHAT\nprogram: x\ncontract: f32\ntokens: {TOKENS}\npoints:\n  NAME: layers.{{n}}.up\n"
    tensor = torch.from_numpy(healthy["layers.1.up"].values)[None]
    torch.save({"model": {"layers.1": tensor}, "step": 3}, tmp_path / "d.pt")
    (tmp_path / "d").mkdir()
    torch.save({"value": tensor.half(), "meta": {"rank": 0}}, tmp_path / "d" / "rank=0___name=up___layer=1.pt")
    for what, name, off in (("d.pt", "model.layers.{n}", 0), ("d", '"rank={*}name=up{*}layer={n}"', 1e-3)):
        (tmp_path / "d.yaml").write_text(mapping.replace("WHAT", what).replace("NAME", name))
        found = source(str(tmp_path / "d.yaml"), model).run(TOKENS)["layers.1.up"].values
        assert distance(found, healthy["layers.1.up"].values, healthy["layers.1.up"].values).max() <= off
    torch.save({"model": {"layers.1": Path("/")}}, tmp_path / "d.pt")
    (tmp_path / "d.yaml").write_text(mapping.replace("WHAT", "d.pt").replace("NAME", "model.layers.{n}"))
    with pytest.raises(AprlabError) as caught:
        source(str(tmp_path / "d.yaml"), model)
    assert caught.value.code == "dump.not-arrays" and "safe loader" in str(caught.value)


@live_only
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_random_models_of_each_architecture(folder: Path, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    numbers: dict[str, Any] = {
        "vocab_size": 840, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 832,
        "eos_token_id": 833,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**numbers, **({"head_dim": 16} if kind != "Qwen2" else {}))
    live = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in live.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # zeros would hide a bias that is lost
    live.save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_bytes((folder / name).read_bytes())
    model = open_model(tmp_path / "m")
    theirs = source(live)
    trace = theirs.run(TOKENS, prompt=PROMPT)
    operations = shadow_of(trace, Judges(model, theirs.contract), model.config)
    assert {o.point for o in operations} == set(trace.points)
    assert [o.point for o in operations if not o.fits] == []


@live_only
def test_injection_goes_on_and_nothing_is_left_behind(folder: Path) -> None:
    from torch_faults import load

    live = load(folder)
    space = sys.modules[type(live).__module__].__dict__
    rotate = space["apply_rotary_pos_emb"]
    theirs = source(live)
    healthy = theirs.run(TOKENS, prompt=PROMPT)
    at = np.array([2, 7])
    ours = source("reference", folder)
    for point in ("embed", "layers.0.q_rope", "layers.0.attn", "layers.0.ffn_inp", "layers.0.swiglu", "layers.0.out"):
        values = (healthy[point].values[at] * 1.5).astype(np.float32)
        inject = {point: Point(point, values, at, "x", "f32")}
        found, expected = (s.run(TOKENS, prompt=PROMPT, inject=inject) for s in (theirs, ours))
        assert np.array_equal(found[point].values[at], values)
        assert distance(found["logits"].values, expected["logits"].values, expected["logits"].values).max() < 1e-4
        assert not np.array_equal(found["logits"].values[7], healthy["logits"].values[7])
    assert space["apply_rotary_pos_emb"] is rotate
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in live.modules())


@live_only
@pytest.mark.parametrize("name", ["theta 1e4", "k bias 0", "scale 1/8", "gate and up exchanged", "gelu", "heads by modulo"])
def test_a_patched_module_is_named_and_proved(folder: Path, name: str) -> None:
    from foreign_evidence import named
    from torch_faults import FAULTS, load

    change, step, names = FAULTS[name]
    live = load(folder)
    change(live)
    verdict = peel_sources(open_model(folder), [source(live)], prompt="Hi")
    assert verdict.verdict == "broken"
    assert verdict.first_divergence is not None and verdict.first_divergence["point"].endswith(f".{step}")
    assert named(verdict) & set(names)
    assert verdict.repair is not None
    equal, of = verdict.repair.proof["with the right values injected"]["likeliest token equal"].split(" of ")
    assert equal == of


@live_only
def test_what_is_no_such_model_is_refused(folder: Path) -> None:
    from torch_faults import load

    for what in (torch.nn.Linear(2, 2), load(folder).double()):
        with pytest.raises(AprlabError) as caught:
            source(what)
        assert caught.value.code == "source.torch-unknown"
