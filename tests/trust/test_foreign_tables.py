"""Cases, tables of statistics, dumps and their arrays from strangers: read, or refused by one line that names the file."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import CONFIG
from made import made_model, pieces_data, write_gguf

from aprlab.errors import AprlabError
from aprlab.forensics.cases import MOST, TEXT_LIMIT, read_cases
from aprlab.formats import open_model
from aprlab.instruments import statistics_tables
from aprlab.instruments.statistics_tables import read_statistics
from aprlab.sources.dumps import dump


def refused(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(AprlabError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line and path.name in line and caught.value.exit_code == 2
    return caught.value.code


def case(**entries: object) -> str:
    return json.dumps({"prompt": "a", "text": "b", **entries})


CASES = {
    "nesting": "[" * 100_000, "a number": "5", "no list": '{"cases": 5}', "none": "[]", "digits": f'{{"prompt": 1{"0" * 5000}}}',
    "ids are a number": case(token_ids=5), "ids are words": case(token_ids=["a", None]), "ids beyond": case(token_ids=[10**30]),
    "ids are no whole numbers": '{"prompt": "a", "token_ids": [1.5, NaN]}', "ids are truths": case(token_ids=[True]),
    "ids are a word": case(token_ids="12"), "a negative id": case(token_ids=[-1]), "causes in causes": case(cause=[["a"]]),
    "a system message that is a number": case(system=5), "a prompt that is a list": case(prompt=["a"]),
    "a long answer": case(text="a " * TEXT_LIMIT), "a long prompt": case(prompt="a " * TEXT_LIMIT),
    "many": json.dumps([json.loads(case())] * (MOST + 1)), "nothing seen": '{"prompt": "a"}',
}  # fmt: skip
TABLES = {
    "nesting": "[" * 100_000, "a long field": f'name,mean\n"{"a" * 300_000}",1\n', "no rows": "[1, 2]",
    "a long number": f"name,mean\na,{'1' * 200_000}\n", "two names": "name,mean\na,1\na,2\n", "no number": "name,mean\na,b\n",
    "UTF-16": "name,mean\na,1".encode("utf-16"),
}  # fmt: skip
READ = {  # odd, and readable
    "a shape of many digits": f"name,mean,shape\na,1,{'9' * 5000}\n", "a type of other digits": "name,mean,type\na,1,²\n",
    "a type of many digits": f"name,mean,type\na,1,{'9' * 5000}\n", "a small number": "name,mean\na,1e-999999999\n",
    "no finite number": "name,mean,std\na,nan,inf\n", "a layer of many digits": f"name,mean\nblk.{'9' * 6000}.attn_q.weight,1\n",
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_cases(what: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(CASES[what])
    assert refused(read_cases, tmp_path / "c.json").startswith("cases.")


@pytest.mark.parametrize("what", TABLES)
def test_tables(what: str, tmp_path: Path) -> None:
    text = TABLES[what]
    (tmp_path / "t").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refused(read_statistics, tmp_path / "t").startswith("statistics.")


@pytest.mark.parametrize("what", READ)
def test_odd_tables_are_read(what: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(READ[what])
    assert len(read_statistics(tmp_path / "t").rows) == 1


@pytest.mark.parametrize("read", [read_cases, read_statistics])
def test_what_is_no_file(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", tmp_path / "loop", tmp_path, Path("/dev/zero")):
        refused(read, path)


# ── dumps ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def stated(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    """An array's file that states a shape, and has 64 bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(64)


def zipped(member: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("logits.npy", member)
        return "a.npz"

    return make


def alone(write: Callable[[Path], object]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "arrays").mkdir()
        write(folder / "arrays" / "logits.npy")
        return "arrays"

    return make


ARRAYS: dict[str, Callable[[Path], str]] = {
    "a terabyte is stated": zipped(stated((10**12,))), "10^30 values are stated": zipped(stated((10**30,))),
    "less than nothing": zipped(stated((-5,))), "objects": zipped(stated((3,), "|O")), "no array": zipped(b"x"),
    "unpacks to 100 MB": zipped(bytes(100 << 20)), "alone, a terabyte": alone(lambda path: path.write_bytes(stated((10**12,)))),
    "alone, a pipe": alone(os.mkfifo), "alone, a device": alone(lambda path: path.symlink_to("/dev/zero")),
    "a device": lambda folder: "/dev/zero", "a NUL in the name": lambda folder: "a\\0b", "nothing": lambda folder: "gone.npz",
}  # fmt: skip


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_of_a_dump(what: str, tmp_path: Path) -> None:
    arrays = ARRAYS[what](tmp_path)
    mapping = f'arrays: "{arrays}"\nprogram: x\ncontract: f32\ntokens: [1, 2, 3]\npoints: {{logits: logits}}\n'
    (tmp_path / "m.yaml").write_text(mapping)
    with pytest.raises(AprlabError) as caught:
        dump(tmp_path / "m.yaml", CONFIG)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and caught.value.path is not None


@pytest.mark.parametrize("mapping", ["contract: f64", "points: {logits: {point: logits, positions: [0, 0, 0]}}"])
def test_a_mapping_that_contradicts_itself(mapping: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", logits=np.zeros((3, CONFIG.vocab_size), np.float32))
    lines = {"arrays": "a.npz", "program": "x", "contract": "f32", "tokens": "[1, 2, 3]", "points": "{logits: logits}"}
    good = {**lines}
    key, _, value = mapping.partition(": ")
    for entries, right in ((good, True), ({**lines, key: value}, False)):
        (tmp_path / "m.yaml").write_text("".join(f"{name}: {entry}\n" for name, entry in entries.items()))
        if right:
            assert list(dump(tmp_path / "m.yaml", CONFIG).trace) == ["logits"]
        else:
            refused(lambda path: dump(path, CONFIG), tmp_path / "m.yaml")


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers(score: float, tmp_path: Path) -> None:
    """Pieces cannot be compared by them: refused where the vocabulary is read, by every verb alike."""
    data = pieces_data()
    config = replace(CONFIG, architecture="llama", rope_type="norm", block_count=1)
    path = write_gguf(made_model(config, replace(data, scores=[*data.scores[:-1], score])), tmp_path / "m.gguf")
    assert refused(lambda path: open_model(path).tokenizer, path) == "tokenizer.score-not-finite"


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_table_of_more_rows_than_tensors_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_tables, "ROWS_LIMIT", 3)
    path = tmp_path / f"t.{kind}"
    for rows in (3, 4):
        listed = [{"name": f"blk.{n}.attn_q.weight", "mean": "0.5"} for n in range(rows)]
        text = json.dumps(listed) if kind == "json" else "name,mean\n" + "".join(f"{row['name']},0.5\n" for row in listed)
        path.write_text(text, encoding="utf-8")
        if rows == 3:
            assert len(read_statistics(path).rows) == 3
    assert refused(read_statistics, path) == "statistics.too-many-rows"
