"""A law over formats: the same fault in a GGUF, an APR and a SafeTensors file has the same id, next to any reference."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faults_in_formats import FORMATS, NotHeld, write_with
from variants import shallow

from aprlab import paths
from aprlab.conversion.converter import convert, export
from aprlab.conversion.recode import at_hand
from aprlab.conversion.seams import Seams
from aprlab.faults import FAULTS
from aprlab.formats import open_model
from aprlab.model.tensor import Tensor
from aprlab.onion import peeling
from aprlab.onion.peeling import peel
from aprlab.quants import types

FAULTS_OF_FILES = [fault.id for fault in FAULTS.values() if fault.seams is not None]
NEXT = dict(zip(FORMATS, (*FORMATS[1:], FORMATS[0]), strict=True))

# Why a format cannot hold a fault, where its writer could still write something: what is said of that instead.
REFUSED = {
    ("duplicate-tensor", "gguf"): "container.unreadable",  # a list by name: the second is refused before anything is compared
    ("bf16-as-f32", "safetensors"): "container.unreadable",  # dtype, shape and data_offsets are one law
}
DECODED = {("default-dequantise", "safetensors")}  # to hold floats is what the format is for: equivalent, and no fault
THROUGH = {("GH-191-code", "gguf"), ("GH-438", "gguf")}  # GGUF states no sizes, so the container says it first: a gap


@pytest.fixture(scope="module", autouse=True)
def instruments_tested_once() -> Iterator[None]:
    """`peel` tests its instruments each time, which is not what is asked here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peeling, "tested", functools.cache(peeling.tested))
        yield


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two layers of the embedded model in BF16, by format; and ``blocks``, what they were decoded from."""
    root = tmp_path_factory.mktemp("healthy")
    found = {"gguf": root / "m.gguf", "apr": root / "m.apr", "safetensors": root / "hf", "blocks": root / "blocks.gguf"}
    shallow(paths.embedded_model(), found["blocks"], 2)
    export(found["blocks"], found["safetensors"], format="safetensors", dtype="bf16")
    convert(found["safetensors"], found["apr"])
    export(found["apr"], found["gguf"])
    return found


@pytest.fixture(scope="module")
def written(healthy: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Fault -> the formats that hold it -> the file."""
    root = tmp_path_factory.mktemp("written")
    found: dict[str, dict[str, Path]] = {}
    for id in FAULTS_OF_FILES:
        change = FAULTS[id].seams
        assert change is not None
        found[id] = {}
        for format in FORMATS:
            with contextlib.suppress(NotHeld):
                found[id][format] = write_with(change, healthy[format], root / f"{id}.{format}", format)
    return found


@pytest.mark.parametrize("id", FAULTS_OF_FILES)
def test_one_fault_has_one_id_in_every_format(id: str, healthy: dict[str, Path], written: dict[str, dict[str, Path]]) -> None:
    for format, path in written[id].items():
        verdict = peel(healthy[NEXT[format]], path, fast=(id, format) not in THROUGH)
        bad = [f for f in verdict.findings if not f.harmless]
        if (id, format) in REFUSED:
            assert [f.code for f in bad] == [REFUSED[id, format]], f"{format}: {verdict}"
        elif (id, format) in DECODED:
            assert (verdict.verdict, verdict.faults) == ("equivalent", []), f"{format}: {verdict}"
        else:
            (found,) = [f for f in verdict.findings if f.fault is not None]
            assert id in (found.fault, *found.evidence.get("leaves_the_same_file_as", ())), f"{format}: {verdict}"
            assert found.evidence["reproduces_the_file"] is True, f"{format}: {verdict}"


def test_what_the_formats_hold(written: dict[str, dict[str, Path]]) -> None:
    """A fault of blocks changes no float; all others that BF16 can have are in at least two formats, most in three."""
    assert sum(len(formats) == 3 for formats in written.values()) >= 30
    assert not [id for id in FAULTS_OF_FILES if FAULTS[id].layer == "decode" and written[id]]
    assert {id for id, formats in written.items() if len(formats) == 1} <= {"rope-norm", "head-dim-guessed", "head-dim-halved"}


@pytest.mark.parametrize("format", FORMATS)
def test_healthy_files_have_no_id(format: str, healthy: dict[str, Path]) -> None:
    for other in FORMATS:
        verdict = peel(healthy[other], healthy[format], fast=True)
        assert (verdict.exit_code, verdict.faults) == (0, []), str(verdict)
    verdict = peel(healthy["blocks"], healthy[format], fast=True)
    assert not [f for f in verdict.findings if not f.harmless], str(verdict)


TWINS = ["permuted-qk", "swapped-k-v", "swapped-gate-up", "swapped-layers", "transposed-embedding", "lost-qkv-biases",
         "missing-biases", "norm-plus-one", "bf16-as-f16", "GH-190", "fused-biases", "GH-202"]  # fmt: skip


@pytest.mark.parametrize("id", TWINS)
def test_floats_next_to_the_blocks_that_they_were_decoded_from(id: str, healthy: dict[str, Path], tmp_path: Path) -> None:
    change = FAULTS[id].seams
    assert change is not None
    path = write_with(change, healthy["safetensors"], tmp_path / "twin", "safetensors")
    verdict = peel(healthy["blocks"], path, fast=True)
    (found,) = [f for f in verdict.findings if not f.harmless]
    assert (verdict.verdict, found.fault, found.evidence["reproduces_the_file"]) == ("broken", id, True), str(verdict)


PAIRS = [*(("safetensors", other) for other in (*FORMATS, "blocks")), ("gguf", "apr"), ("apr", "safetensors")]


@pytest.mark.parametrize(("format", "reference"), PAIRS)
def test_one_tensor_scaled(format: str, reference: str, healthy: dict[str, Path], tmp_path: Path) -> None:
    name = "blk.1.ffn_up.weight"

    def scaled(tensor: Tensor) -> Tensor:
        values = tensor.dequantise() * np.float32(1.02)
        halves = ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)  # BF16, rounded
        return tensor.replace(raw=halves.view(np.uint8).reshape(-1))

    def change(seams: Seams) -> Seams:
        return replace(seams, tensor=lambda t: scaled(at_hand(seams.tensor(t))) if t.name == name else seams.tensor(t))

    verdict = peel(healthy[reference], write_with(change, healthy[format], tmp_path / "scaled", format), fast=True)
    (found,) = [f for f in verdict.findings if not f.harmless]
    assert (found.code, found.tensors, found.parameters["by"]) == ("weights.scaled", [name], 1.02), str(verdict)
    assert (verdict.verdict, verdict.faults) == ("broken", []), str(verdict)


def test_f16_labelled_bf16(healthy: dict[str, Path], tmp_path: Path) -> None:
    """The reverse of `bf16-as-f16` is in no ticket: it has no id, and the finding says which label is wrong."""
    export(healthy["blocks"], tmp_path / "f16", format="safetensors", dtype="f16")

    def change(seams: Seams) -> Seams:
        return replace(seams, code=lambda kind: types.BF16.code if kind is types.F16 else kind.code)

    path = write_with(change, tmp_path / "f16", tmp_path / "bf16", "safetensors")
    with open_model(path) as model:
        count = len(model.tensors)
    verdict = peel(healthy["blocks"], path, fast=True)
    (found,) = [f for f in verdict.findings if not f.harmless]
    assert (found.code, len(found.tensors)) == ("dtype.code-of-another-type", count), str(verdict)
    assert (found.parameters["type"], found.parameters["means"]) == ("F16", "BF16")
