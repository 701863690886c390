"""Models that cannot be run here: their files are inspected, compared, peeled, converted and gated; a run is refused.

The files are gguf-py's (`foreign_files`). Every check that passes on a sound file is shown a fault that it finds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
from foreign_files import KINDS, write

from aprlab import quants
from aprlab.cli.app import run_cli as main
from aprlab.conversion import convert, export
from aprlab.errors import AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.formats import gguf, open_model
from aprlab.formats.gguf_record import header_of, keys_of
from aprlab.formats.identity import FILE_ONLY, file_only
from aprlab.gates import run as run_gates
from aprlab.gates.catalogue import GATES
from aprlab.inference import Session
from aprlab.instruments import diff, fingerprint
from aprlab.onion.peeling import peel
from aprlab.quants import types

AFTER = ("naming", "layout", "config", "tokenizer", "forward")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    return {kind: write(folder / f"{kind}.gguf", kind) for kind in KINDS}


def changed(path: Path, out: Path, change: Callable[[dict[str, gguf.Field], list[tuple[str, int, bytes]]], None]) -> Path:
    """The file written again after `change` of its fields and its tensors (name, type code, bytes)."""
    header = gguf.read_header(path)
    model = gguf.model_of(header)
    tensors = [(i.name, i.code, model.tensors[i.name].raw.tobytes()) for i in header.infos]
    fields = dict(header.fields)
    change(fields, tensors)
    shapes = {i.name: i.ne for i in header.infos}
    infos, body = [], b""
    for (name, code, raw), old in zip(tensors, header.infos, strict=False):
        infos.append(gguf.TensorInfo(name, shapes.get(name, old.ne), code, len(body), 0))
        body += raw + bytes(-len(raw) % 32)
    out.write_bytes(gguf.pack_header(list(fields.values()), infos) + body)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_opens_and_a_run_is_refused_by_name(files: dict[str, Path], kind: str) -> None:
    model = open_model(files[kind])
    reader = gguf_py.GGUFReader(files[kind])
    assert [t.name for t in reader.tensors] == list(model.tensors)
    for theirs in reader.tensors:
        mine = model.tensors[theirs.name]
        assert (mine.type.code, mine.ne) == (int(theirs.tensor_type), tuple(theirs.shape.tolist()))
        assert mine.raw.tobytes() == theirs.data.tobytes()
    error = file_only(model)
    assert error is not None and error.code in FILE_ONLY and repr(kind) in error.message
    with pytest.raises(UnsupportedError, match=kind):
        Session(model)
    assert all(np.isfinite([p.seen.mean, p.seen.std]).all() for p in fingerprint(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", ["aprender", "realizar"])
def test_apr_keeps_every_tensor_and_key_and_gives_the_file_back(
    files: dict[str, Path], tmp_path: Path, kind: str, dialect: str
) -> None:
    report = convert(files[kind], tmp_path / "x.apr", dialect=dialect)
    assert report.reversible
    model, source = open_model(tmp_path / "x.apr"), open_model(files[kind])
    assert model.format == "apr" and model.dialect.startswith(dialect)
    assert keys_of(model) == keys_of(source)
    assert {k: f.type_name for k, f in header_of(model).fields.items()} == {
        k: f.type_name for k, f in header_of(source).fields.items()
    }
    assert diff(files[kind], tmp_path / "x.apr").equal
    assert peel(files[kind], tmp_path / "x.apr").verdict == "same"
    with pytest.raises(UnsupportedError, match=kind):
        Session(model)
    assert export(tmp_path / "x.apr", tmp_path / "back.gguf").reversible
    assert (tmp_path / "back.gguf").read_bytes() == files[kind].read_bytes()


def test_a_file_that_cannot_be_given_back_keeps_its_keys_all_the_same(files: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(files["phi3"].read_bytes())
    header = gguf.read_header(files["phi3"])
    assert not any(data[header.data_offset - 4 : header.data_offset])
    data[header.data_offset - 1] = 7  # padding that is not zero: no record gives such a byte back
    (tmp_path / "odd.gguf").write_bytes(data)
    assert not convert(tmp_path / "odd.gguf", tmp_path / "x.apr").reversible
    assert diff(tmp_path / "odd.gguf", tmp_path / "x.apr").equal
    export(tmp_path / "x.apr", tmp_path / "back.gguf")
    assert diff(tmp_path / "odd.gguf", tmp_path / "back.gguf").equal


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "oddity"])
def test_requantised_matrices_are_what_gguf_py_makes_of_them(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    convert(files[kind], tmp_path / "q.gguf", quantize="q8_0")
    before, after = open_model(files[kind]), open_model(tmp_path / "q.gguf")
    left = {k: v for k, v in keys_of(before).items() if k != "general.file_type"}
    assert {k: v for k, v in keys_of(after).items() if k != "general.file_type"} == left
    encoded = 0
    for name, tensor in before.tensors.items():
        matrix = len(tensor.shape) > 1 and not name.endswith(("_inp.weight", "token_types.weight", "position_embd.weight"))
        if not matrix or tensor.type is types.Q8_0:
            assert after.tensors[name].raw.tobytes() == tensor.raw.tobytes(), name
            continue
        wanted = gguf_py.quants.quantize(tensor.dequantise(), gguf_py.GGMLQuantizationType.Q8_0)
        assert after.tensors[name].raw.tobytes() == wanted.tobytes(), name
        encoded += 1
    assert encoded
    verdict = peel(files[kind], tmp_path / "q.gguf")
    assert (verdict.verdict, verdict.exit_code) == ("equivalent", 0) and "forward" in verdict.not_looked_at


def test_what_cannot_be_converted_is_refused_in_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    for ask, kind, code in (
        (lambda: convert(files["phi3"], tmp_path / "o.gguf", quantize="q4_k_m"), UsageError,
         "conversion.mix-of-another-architecture"),
        (lambda: export(files["phi3"], tmp_path / "o", format="safetensors"), UnsupportedError, "identity.other-architecture"),
        (lambda: diff(files["phi3"], files["qwen3moe"]), UnsupportedError, "identity.other-architecture"),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            ask()
        assert caught.value.code == code and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    convert(files["bert"], tmp_path / "x.apr")
    data = (tmp_path / "x.apr").read_bytes()
    for old, new in ((b'"kv":', b'"vk":'), (b'"uint32"', b'"uint99"'), (b'"tensors":', b'"sensors":')):
        assert old in data
        (tmp_path / "y.apr").write_bytes(data.replace(old, new))
        with pytest.raises(FormatError) as caught:
            open_model(tmp_path / "y.apr").config  # noqa: B018
        assert caught.value.code in ("apr.record-damaged", "apr.footer-crc")
        assert peel(files["bert"], tmp_path / "y.apr").verdict == "broken"


# ── peel ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def exchange(fields: dict[str, gguf.Field], tensors: list[tuple[str, int, bytes]]) -> None:
    (a, *x), (b, *y) = tensors[4], tensors[9]
    tensors[4], tensors[9] = (b, *x), (a, *y)  # type: ignore[assignment]


def negate(fields: dict[str, gguf.Field], tensors: list[tuple[str, int, bytes]]) -> None:
    name, code, raw = tensors[-2]
    tensors[-2] = (name, code, (-np.frombuffer(raw, "<f4")).tobytes())


def relabel(fields: dict[str, gguf.Field], tensors: list[tuple[str, int, bytes]]) -> None:
    n = next(n for n, t in enumerate(tensors) if t[1] == types.Q4_0.code)
    tensors[n] = (tensors[n][0], types.by_name("IQ4_NL").code, tensors[n][2])


def theta(fields: dict[str, gguf.Field], tensors: list[tuple[str, int, bytes]]) -> None:
    fields["phi3.rope.freq_base"] = replace(fields["phi3.rope.freq_base"], value=500.0)


def lose(fields: dict[str, gguf.Field], tensors: list[tuple[str, int, bytes]]) -> None:
    del fields["phi3.attention.head_count_kv"]


def tokens(fields: dict[str, gguf.Field], tensors: list[tuple[str, int, bytes]]) -> None:
    listed = list(fields["tokenizer.ggml.tokens"].value)
    fields["tokenizer.ggml.tokens"] = replace(fields["tokenizer.ggml.tokens"], value=listed[1:] + listed[:1])


def drop(fields: dict[str, gguf.Field], tensors: list[tuple[str, int, bytes]]) -> None:
    del tensors[-1]


FAULTS = {
    "naming.modules-exchanged": exchange, "weights.negated": negate, "dtype.code-of-another-type": relabel,
    "config.value-differs": theta, "config.key-missing": lose, "tokenizer.rotated": tokens, "naming.tensors-missing": drop,
}  # fmt: skip


@pytest.mark.parametrize("code", FAULTS)
def test_peel_finds_what_is_wrong_with_such_a_file(files: dict[str, Path], tmp_path: Path, code: str) -> None:
    broken = changed(files["phi3"], tmp_path / "broken.gguf", FAULTS[code])
    verdict = peel(files["phi3"], broken)
    assert (verdict.verdict, verdict.exit_code) == ("broken", 3)
    assert code in [f.code for f in verdict.findings if not f.harmless]
    assert list(verdict.not_looked_at) == ["forward"] and "phi3" in verdict.not_looked_at["forward"]
    fast = peel(files["phi3"], broken, fast=True)
    assert fast.verdict == "broken" and "forward" in fast.not_looked_at
    assert code == "tokenizer.rotated" or "--fast" in "".join(fast.not_looked_at.values())


def test_the_same_file_is_the_same_and_what_was_not_looked_at_is_said(files: dict[str, Path]) -> None:
    for kind, path in files.items():
        verdict = peel(path, path)
        assert (verdict.verdict, verdict.findings) == ("same", []), kind
        assert list(verdict.to_json()["not_looked_at"]) == ["forward"]
        assert "not looked at: forward" in str(verdict)
        alone = peel(None, path)
        assert (alone.verdict, alone.findings) == ("unproved", []), kind
        assert tuple(alone.to_json()["not_looked_at"]) == AFTER


def test_one_file_alone_shows_broken_blocks(files: dict[str, Path], tmp_path: Path) -> None:
    def spoil(fields: dict[str, gguf.Field], tensors: list[tuple[str, int, bytes]]) -> None:
        n = next(n for n, t in enumerate(tensors) if t[1] == types.Q8_0.code)
        tensors[n] = (*tensors[n][:2], tensors[n][2][:34] + b"\x00\x7e" + tensors[n][2][36:])  # type: ignore[assignment]

    verdict = peel(None, changed(files["falcon"], tmp_path / "nan.gguf", spoil))
    assert verdict.verdict in ("suspect", "broken")
    assert "weights.scales-not-finite" in [f.code for f in verdict.findings]


def test_a_reference_of_another_kind_is_not_compared(files: dict[str, Path], tiny: Path) -> None:
    assert peel(tiny, files["phi3"]).verdict == "not-comparable"
    assert peel(files["bert"], files["phi3"]).exit_code != 0


# ── gates and the command line ────────────────────────────────────────────────────────────────────────────────────


def said(ref: Path, cand: Path, **options: Any) -> dict[str, bool | None]:
    return {r.id: r.passed for r in run_gates(ref, cand, **options)}


def test_gates_that_need_no_run_speak_and_the_others_say_that_they_do(files: dict[str, Path], tmp_path: Path) -> None:
    convert(files["qwen3moe"], tmp_path / "x.apr")
    sound = said(files["qwen3moe"], tmp_path / "x.apr")
    assert sound == {id: None if gate.runs else True for id, gate in GATES.items()}
    assert {id for id, gate in GATES.items() if not gate.runs} >= {"F-GOLDEN-RULE-002", "F-ROSETTA-FP-001", "I-1", "I-2", "I-3"}
    convert(files["qwen3moe"], tmp_path / "q.apr", quantize="q4_0")
    assert said(files["qwen3moe"], tmp_path / "q.apr")["F-ROSETTA-FP-001"] is False
    again = said(files["qwen3moe"], tmp_path / "q.apr", requantised="q4_0")
    assert again == sound
    broken = changed(files["qwen3moe"], tmp_path / "broken.gguf", exchange)
    assert False in said(files["qwen3moe"], broken).values()
    keyless = changed(files["qwen3moe"], tmp_path / "keyless.gguf", lambda f, t: f.pop("qwen3moe.expert_used_count") and None)
    assert said(files["qwen3moe"], keyless)["I-1"] is False


def test_the_command_line(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(files["gemma2"])
    assert main(["inspect", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["gemma2.attention.sliding_window"] == 32
    assert main(["inspect", path]) == 0
    assert "gemma2.attention.sliding_window" in capsys.readouterr().out
    assert main(["peel", path, path, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["not_looked_at"]) == ["forward"]
    assert main(["convert", path, "-o", str(tmp_path / "q.gguf"), "--quantize", "q5_0"]) == 0
    assert main(["gates", path, str(tmp_path / "q.gguf")]) == 3
    for verb in (["run", path, "-p", "hi"], ["check", path]):
        capsys.readouterr()
        assert main(verb) == 2
        assert "gemma2" in capsys.readouterr().err


def test_any_name_survives_and_none_is_taken_for_another(files: dict[str, Path], tmp_path: Path) -> None:
    """A tensor called as Hugging Face would call it stays what it is, next to one that GGUF calls so."""
    convert(files["oddity"], tmp_path / "x.apr")
    assert set(open_model(tmp_path / "x.apr").tensors) == set(open_model(files["oddity"]).tensors)
    assert quants.can_decode(types.F64)
    with pytest.raises(AprlabError):
        open_model(tmp_path / "x.apr").config  # noqa: B018
