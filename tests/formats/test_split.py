"""Models in several files, split by gguf-py: any part stands for the whole, and what does not belong together is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from foreign_files import write
from variants import variant

from aprlab.conversion import convert, export
from aprlab.errors import AprlabError
from aprlab.formats import gguf, identify, open_model
from aprlab.formats.raw import look
from aprlab.formats.split import joined
from aprlab.inference import Session
from aprlab.instruments import diff
from aprlab.onion.peeling import peel


def split(path: Path, folder: Path, count: int, stem: str = "m") -> list[Path]:
    """`path` in `count` parts as llama-gguf-split makes them: keys in the first part alone."""
    header = gguf.read_header(path)
    model = gguf.model_of(header)
    made = []
    for n in range(count):
        infos = header.infos[n::count] if count > 1 else header.infos
        keys = list(header.fields.values()) if n == 0 else []
        keys += [
            gguf.field_of("split.no", "uint16", n), gguf.field_of("split.count", "uint16", count),
            gguf.field_of("split.tensors.count", "int32", len(header.infos)),
        ]  # fmt: skip
        tensors = [model.tensors[i.name] for i in infos]
        laid = gguf.layout([(t.name, t.type, t.shape) for t in tensors])
        out = folder / f"{stem}-{n + 1:05d}-of-{count:05d}.gguf"
        body = b"".join(t.raw.tobytes() + bytes(-t.nbytes % 32) for t in tensors)
        out.write_bytes(gguf.pack_header(keys, laid) + body)
        made.append(out)
    return made


@pytest.fixture(scope="module")
def parts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return split(tiny, tmp_path_factory.mktemp("split"), 5)


def test_any_part_is_the_whole_model(tiny: Path, parts: list[Path]) -> None:
    for part in parts:
        model = open_model(part)
        assert identify(part).kind == "model" and "5 files" in model.dialect
        assert diff(tiny, model).equal
        assert not any(key.startswith("split.") for key in model.metadata)
    assert Session(open_model(parts[3])).generate("2+2", max_tokens=3).tokens == Session(open_model(tiny)).generate(
        "2+2", max_tokens=3
    ).tokens
    seen = look(parts[2])
    assert {p.name for p in seen.pieces} == set(open_model(tiny).tensors) and not seen.problems
    assert peel(tiny, parts[1]).verdict == "same"


def test_split_by_gguf_py_and_joined_again(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", "falcon")
    write(tmp_path / "m.gguf", "falcon", split_max_tensors=6)
    made = sorted(tmp_path.glob("m-*-of-*.gguf"))
    assert len(made) == 4
    assert diff(whole, made[2]).equal
    convert(made[1], tmp_path / "joined.gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == whole.read_bytes()
    convert(made[0], tmp_path / "x.apr")
    export(tmp_path / "x.apr", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == whole.read_bytes()


def test_a_missing_part_is_named(tiny: Path, tmp_path: Path) -> None:
    made = split(tiny, tmp_path, 3)
    made[1].unlink()
    for ask in (open_model, lambda path: joined(gguf.read_header(path)), look):
        with pytest.raises(AprlabError, match=r"missing here: m-00002-of-00003\.gguf") as caught:
            ask(made[2])
        assert caught.value.code == "identity.part-of-several"
    verdict = peel(tiny, made[0])
    assert verdict.verdict == "not-comparable" and "m-00002-of-00003.gguf" in verdict.findings[0].mechanism


def other_number(tiny: Path, made: list[Path]) -> None:
    made[1].write_bytes(made[2].read_bytes())


def other_model(tiny: Path, made: list[Path]) -> None:
    variant(tiny, made[1], keys={"split.no": 1, "split.count": 3})


def one_tensor_less(tiny: Path, made: list[Path]) -> None:
    header = gguf.read_header(made[2])
    model = gguf.model_of(gguf.Header(**{**header.__dict__, "fields": {}}))
    tensors = list(model.tensors.values())[:-1]
    laid = gguf.layout([(t.name, t.type, t.shape) for t in tensors])
    body = b"".join(t.raw.tobytes() + bytes(-t.nbytes % 32) for t in tensors)
    made[2].write_bytes(gguf.pack_header(list(header.fields.values()), laid) + body)


def cut(tiny: Path, made: list[Path]) -> None:
    made[2].write_bytes(made[2].read_bytes()[:-64])


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (other_number, "gguf.split-number"), (other_model, "reading.duplicate-tensor"), (one_tensor_less, "gguf.split-count"),
        (cut, "identity.truncated"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(
    tiny: Path, tmp_path: Path, spoil: Callable[[Path, list[Path]], None], code: str
) -> None:
    made = split(tiny, tmp_path, 3)
    spoil(tiny, made)
    with pytest.raises(AprlabError) as caught:
        open_model(made[0])
    assert caught.value.code == code and "-of-00003.gguf" in str(caught.value.path)
    assert peel(tiny, made[0]).exit_code == 3
