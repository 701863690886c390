"""What is this file? Recognised by its first bytes, its size and a GGUF header, before anything in it is trusted.

People give a tool what the download left: a pointer, a login page, one part of five, an adapter. Each of these is named
in one line with what to do, instead of a long list of tensors that are missing. Nothing here raises for any bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aprlab.errors import AprlabError, FormatError, UnsupportedError
from aprlab.formats import gguf
from aprlab.formats.gguf import Header, Strings
from aprlab.formats.huggingface_files import CONFIG, INDEX_SUFFIX, is_folder, quantised, read_json
from aprlab.formats.reading import beginning, open_regular, padding
from aprlab.formats.split import SHARD, count_of, joined, number, says, siblings
from aprlab.model import keys
from aprlab.model.architecture import ARCHITECTURES
from aprlab.model.model import Model
from aprlab.model.remote import open_url, url_of
from aprlab.quants import types

Kind = Literal["model", "layers", "damaged", "foreign"]
# Models without a forward pass here: everything that needs no run works on their files.
FILE_ONLY = ("identity.other-architecture", "identity.mixture-of-experts", "identity.values-per-layer")
_HEAD = 4096  # bytes that tell the kinds apart
_JSON_LIMIT = 1 << 20  # of a JSON text, or of a SafeTensors header, that is parsed to name it


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file is.

    Attributes:
        kind: ``model`` (goes on to its reader), ``layers`` (a sound GGUF file that cannot be run: header, tensors and
            tokenizer may be looked at), ``damaged`` (a model file that is not whole), ``foreign`` (anything else).
        code: ``identity.…``, or the code of the rule that the header breaks; stable.
        says: what it is; a line that follows the file's name.
        remedy: what to do; empty for a model.
        error: the two as an error, None for a model.
        header: of a GGUF file that has a whole one.
    """

    kind: Kind
    code: str
    says: str
    remedy: str
    error: AprlabError | None = field(default=None, repr=False, compare=False)
    header: Header | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.says}; {self.remedy}" if self.remedy else self.says

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return {"kind": self.kind, "code": self.code, "says": self.says, "remedy": self.remedy}


def identify(path: str | Path) -> Identity:
    """What a file or folder is, by bytes and header alone; never raises, whatever the bytes are."""
    path = Path(path)
    url = url_of(path)
    try:
        found = _of_url(url) if url is not None else _of_folder(path) if path.is_dir() else _of_file(path)
    except OSError as error:
        found = _broken("cannot be read", str(error.strerror or error), code="identity.unreadable")
    except AprlabError as error:
        found = Identity("damaged", error.code, error.message, "", error)
    if found.error is not None and found.error.path is None:
        found.error.path = path
    return found


def something_else(model: Model) -> AprlabError | None:
    """The error that says what an opened file is, where it is no model that can be run; None for every model."""
    try:
        assert model.config
    except AprlabError as error:
        return error if error.code.startswith("identity.") else None
    return None


def file_only(model: Model) -> AprlabError | None:
    """Why an opened model cannot be run although its file is sound; None where it can, and for what is no model at all."""
    error = something_else(model)
    return error if error is not None and error.code in FILE_ONLY else None


def no_model(model: Model) -> AprlabError | None:
    """The error that says what an opened file is, where it is no model (an adapter, a projector…); None for every model."""
    error = something_else(model)
    return None if error is not None and error.code in FILE_ONLY else error


def refusing(model: Model, error: AprlabError) -> Model:
    """`model`, whose config and tokenizer from now on raise `error`, which says what it is."""

    def refuse() -> Any:
        raise copy(error)

    model.make_config = model.make_tokenizer = refuse
    return model


def of_keys(header: Header) -> Identity | None:
    """What the keys and names of a header say of a model that cannot be run; None where they speak of one that can."""
    found = _by_architecture(header) or _per_layer(header)
    if found is not None and found.error is not None:
        found.error.path = header.path
    return found


def _of_file(path: Path) -> Identity:
    with open_regular(path) as file:
        head = file.read(_HEAD)
        size = file.seek(0, 2)
    if not head:
        return _broken("is empty: the file starts with nothing", "fetch it again", code="identity.empty")
    if head[:4] == gguf.MAGIC:
        return _of_gguf_bytes(path, head)
    if head[:3] == b"APR":
        return _model("is an APR file")
    for ask in (_older_ggml, _text, _packed, _checkpoint, _safetensors):
        if (found := ask(path, head, size)) is not None:
            return found
    if not any(head):
        return _zeros(path, size)
    return _broken(
        f"neither GGUF nor APR nor SafeTensors: the file starts with {head[:4].hex(' ')}, expected '47 47 55 46' or "
        "'41 50 52 00'", "", code="formats.unknown-format",
    )  # fmt: skip


def _of_url(url: str) -> Identity:
    """What a file or a model's folder at a URL is: by its header, or named by its first bytes."""
    if is_folder(url):
        return _model("is a folder")
    remote = open_url(url)
    head = beginning(remote.path, _HEAD)
    if head[:4] == gguf.MAGIC:
        return _of_gguf_bytes(remote.path, head)
    if head[:3] == b"APR":
        return _model("is an APR file")
    if url.endswith(INDEX_SUFFIX) and head[:1] == b"{":
        return _model("is the index of a sharded model")
    if (found := _safetensors(remote.path, head, remote.size)) is not None:
        return found
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return _foreign("is an HTML page, not a model", "give the file's own address", code="identity.html-page")
    return _broken(
        f"neither GGUF nor APR nor SafeTensors: the file starts with {head[:4].hex(' ')}", "", code="formats.unknown-format"
    )


# ── makers: each says with which error an identity is refused ────────────────────────────────────────────────────


def _model(says: str, header: Header | None = None) -> Identity:
    return Identity("model", "identity.model", says, "", None, header)


def _layers(says: str, remedy: str, *, code: str, at: int | None = None) -> Identity:
    return Identity("layers", code, says, remedy, UnsupportedError(f"{says}; {remedy}", code=code, offset=at))


def _foreign(says: str, remedy: str, *, code: str) -> Identity:
    return Identity("foreign", code, says, remedy, UnsupportedError(f"{says}; {remedy}", code=code))


def _broken(says: str, remedy: str, *, code: str) -> Identity:
    """Nothing that is known at all."""
    return Identity("foreign", code, says, remedy, FormatError(f"{says}; {remedy}" if remedy else says, code=code))


def _damaged(says: str, remedy: str, info: gguf.TensorInfo, *, code: str) -> Identity:
    """A GGUF file that is not whole, from this tensor on."""
    error = FormatError(f"{says}; {remedy}", code=code, tensor=info.name, offset=info.at)
    return Identity("damaged", code, f"tensor {info.name!r} {says}", remedy, error)


# ── files that are no model file ─────────────────────────────────────────────────────────────────────────────────

_FETCH = "fetch the model itself"
_PACKED = (
    (0, b"\x1f\x8b", "gzip", "gunzip"), (0, b"\x28\xb5\x2f\xfd", "zstd", "zstd -d"), (0, b"\xfd7zXZ\0", "xz", "xz -d"),
    (0, b"BZh", "bzip2", "bunzip2"), (0, b"7z\xbc\xaf\x27\x1c", "7-Zip", "7z x"), (0, b"Rar!\x1a\x07", "RAR", "unrar x"),
    (0, b"\x04\x22\x4d\x18", "LZ4", "lz4 -d"), (0, b"PK\x03\x04", "zip", "unzip"), (257, b"ustar", "tar", "tar -xf"),
)  # fmt: skip
_OLDER = {b"ggml": "ggml", b"ggmf": "ggmf", b"ggjt": "ggjt", b"ggla": "ggla (a LoRA adapter)", b"ggsn": "ggsn (a session)"}


def _older_ggml(path: Path, head: bytes, size: int) -> Identity | None:
    magic = head[:4] if head[:4] in _OLDER else head[3::-1]  # a number in the file: either end may come first
    if len(head) < 4 or magic not in _OLDER:
        return None
    return _foreign(
        f"is a file of ggml's older format {_OLDER[magic]}, from before GGUF",
        "no program of today reads it: fetch the model as GGUF, or convert it from its source", code="identity.older-ggml",
    )  # fmt: skip


def _text(path: Path, head: bytes, size: int) -> Identity | None:
    """A pointer, a page, JSON, or a line that some server sent instead of the file."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or size <= len(head):  # else a character cut by the end of the head
            return None
        text = head[: error.start].decode("utf-8-sig")
    if any(ord(c) < 32 and c not in "\t\n\r\f\x1b" for c in text):
        return None
    start = text.lstrip().lower()
    if start.startswith(("version https://git-lfs", "# xet version")):
        stated = re.search(r"^size (\d{1,15})$", text, re.MULTILINE)
        of = f" to {int(stated[1]):,} bytes" if stated else ""
        return _foreign(
            f"is a Git LFS pointer{of}, not the model", "run `git lfs pull` in its repository, or fetch the file itself",
            code="identity.git-lfs-pointer",
        )  # fmt: skip
    if start.startswith(("<!doctype html", "<html", "<head", "<?xml", "<error")):
        title = re.search(r"<(title|code|message)[^>]*>(.*?)</", text, re.IGNORECASE | re.DOTALL)
        said = f" ({_quoted(title[2])})" if title else ""
        what = "an XML answer of a server" if start.startswith(("<?xml", "<error")) else "an HTML page"
        return _foreign(
            f"is {what}{said} under the model's name", f"{_FETCH}, logged in where that is needed", code="identity.html-page"
        )
    if start.startswith(("{", "[")):
        return _json(path, text, size)
    return _broken(
        f"is a text file ({_quoted(text)}), neither GGUF nor APR nor SafeTensors", _FETCH, code="identity.text"
    )


def _quoted(text: str) -> str:
    line = " ".join(text.split())
    return ascii(line if len(line) <= 60 else f"{line[:57]}...")


def _json(path: Path, text: str, size: int) -> Identity:
    value: Any = None
    if size <= _JSON_LIMIT:
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            value = None
    keys = value.keys() if isinstance(value, dict) else ()
    if "weight_map" in keys or "model_type" in keys:
        what = "the index of a sharded model" if "weight_map" in keys else "the config of a model"
        return _foreign(f"is {what}, not its weights", "give the folder that it lies in", code="identity.json")
    reason = next((value[k] for k in ("error", "message", "detail", "errors") if k in keys), None)
    said = f": {_quoted(str(reason))}" if reason is not None else f" ({_quoted(text)})"
    what = "a server's error as JSON" if reason is not None else "a JSON text"
    return _foreign(f"is {what}{said}, not a model", _FETCH, code="identity.json")


def _packed(path: Path, head: bytes, size: int) -> Identity | None:
    if head[:4] == b"PK\x03\x04" and (b"data.pkl" in head or b".npy" in head[:256]):
        return None  # a zip file by its bytes, and something else to its owner
    for at, magic, name, command in _PACKED:
        if head[at : at + len(magic)] == magic:
            return _foreign(f"is packed with {name}", f"unpack it first ({command})", code="identity.packed")
    return None


def _checkpoint(path: Path, head: bytes, size: int) -> Identity | None:
    """Weights in a form of other programs."""
    pickled = head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
    if pickled or (head[:4] == b"PK\x03\x04" and b"data.pkl" in head):
        return _foreign(
            "is a PyTorch checkpoint (a pickle, which may run code when it is loaded)",
            "have transformers write it as SafeTensors (save_pretrained) and give the folder", code="identity.pytorch",
        )  # fmt: skip
    other = (
        ("a NumPy array", head[:6] == b"\x93NUMPY" or (head[:4] == b"PK\x03\x04" and b".npy" in head[:256])),
        ("an ONNX model", head[0] == 8 and 0 < head[1:2][0] < 32 and head[2:3] == b"\x12" if len(head) > 2 else False),
        ("an HDF5 file", head[:8] == b"\x89HDF\r\n\x1a\n"),
        ("a TensorFlow Lite model", head[4:8] == b"TFL3"),
        ("a program", head[:4] == b"\x7fELF" or head[:6] == b"MZqFpD"),
    )  # fmt: skip
    for name, yes in other:
        if yes:
            return _foreign(
                f"is {name}", "give a GGUF or APR file, or a Hugging Face folder with SafeTensors", code="identity.other-format"
            )
    if _old_imatrix(head):
        return _imatrix()
    return None


def _old_imatrix(head: bytes) -> bool:
    """llama.cpp's first form of an importance matrix: a count, then names with their sums."""
    if len(head) < 8:
        return False
    entries, length = struct.unpack_from("<ii", head)
    name = head[8 : 8 + length] if 0 < length < 128 else b""
    return 0 < entries < 100_000 and name.endswith(b".weight") and name.isascii()


def _safetensors(path: Path, head: bytes, size: int) -> Identity | None:
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{" or length > 1 << 32:
        return _model("is a SafeTensors file") if path.suffix == ".safetensors" else None
    if (part := SHARD.fullmatch(path.name)) is not None and int(part[3]) > 1:
        return _foreign(
            f"is part {int(part[2])} of {int(part[3])} of a model", "give the folder that all parts lie in",
            code="identity.part-of-several",
        )  # fmt: skip
    if 0 < length <= _JSON_LIMIT:
        text = beginning(path, 8 + length)[8:]
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):
            listed = None
        names = [name for name in listed if name != "__metadata__"] if isinstance(listed, dict) else []
        if names and all("lora_" in name for name in names):
            return _lora("merge it into its base model (peft: merge_and_unload, then save_pretrained)")
    return _model("is a SafeTensors file")


def _zeros(path: Path, size: int) -> Identity:
    again = "the download wrote nothing into it: fetch it again"
    file = np.memmap(path, np.uint8, "r")
    places = np.linspace(0, max(size - _HEAD, 0), 1024).astype(np.int64) if size > 1 << 26 else None
    parts = (file[n : n + _HEAD] for n in places) if places is not None else iter([file])
    if any(part.any() for part in parts):
        return _broken("starts with zeros where a model file has its name", again, code="identity.zeros")
    return _broken(f"holds only zeros ({size:,} bytes)", again, code="identity.zeros")


def _of_folder(path: Path) -> Identity:
    """A folder: of a model for its reader, or what it holds instead."""
    there = {entry.name for entry in path.iterdir()}
    weights = sorted(name for name in there if name.endswith(".safetensors"))
    if "adapter_config.json" in there and weights in ([], ["adapter_model.safetensors"]):
        return _lora("merge it into its base model (peft: merge_and_unload, then save_pretrained)")
    if CONFIG in there and (found := quantised(read_json(path / CONFIG))) is not None:
        return _foreign(*found, code="identity.quantised-checkpoint")
    if not weights and "model.safetensors.index.json" not in there:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in there) and "config.json" in there:
            return _foreign(
                "holds a PyTorch checkpoint and no SafeTensors", "have transformers write it again (save_pretrained)",
                code="identity.pytorch",
            )  # fmt: skip
        files = sorted(name for name in there if name.endswith((".gguf", ".apr")))
        if files and not any(name.endswith(".json") for name in there):
            return _foreign(
                f"is a directory, not a model file; it holds {', '.join(map(ascii, files[:3]))}", "give one of these files",
                code="identity.folder-of-files",
            )  # fmt: skip
    return _model("is a folder")


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _of_gguf_bytes(path: Path, head: bytes) -> Identity:
    version = head[4:8]
    if version in (b"\0\0\0\1", b"\0\0\0\2", b"\0\0\0\3"):
        return _foreign(
            "is a big-endian GGUF file, made for another kind of machine",
            "convert it with gguf-py (gguf_convert_endian.py FILE little)", code="identity.big-endian",
        )  # fmt: skip
    if version == b"\1\0\0\0":
        return _foreign(
            "is GGUF version 1, which llama.cpp no longer reads either (versions 2 and 3 are handled)",
            "convert it again from its source", code="identity.gguf-version-1",
        )  # fmt: skip
    header = gguf.read_header(path)
    there = siblings(path, count_of(header)) or {}
    if header.remote is not None and there:
        return of_gguf(joined(header))
    if there and all(part.is_file() for part in there.values()):
        header = joined(header)
    return of_gguf(header)


def of_gguf(header: Header) -> Identity:
    """What a GGUF file with this header is."""
    asked: tuple[Callable[[Header], Identity | None], ...] = (
        _part, _by_type, _by_types_of_tensors, _by_layout, _by_architecture, _per_layer
    )  # fmt: skip
    found = next((found for ask in asked if (found := ask(header)) is not None), None)
    if found is None:
        return _model("is a GGUF model", header)
    if found.error is not None and found.error.path is None:
        found.error.path = header.path
    return replace(found, header=header)


def _string(header: Header, key: str) -> str | None:
    value = header.value(key)
    return value if isinstance(value, str) else None


def _place(header: Header, key: str) -> int | None:
    """Where a key is in the file."""
    return header.fields[key].offset if key in header.fields else None


def _part(header: Header) -> Identity | None:
    """One part of a split model whose other parts are not all here."""
    count = count_of(header)
    if count == 1 or header.parts:
        return None
    there = siblings(header.path, count)
    missing = [] if there is None else [path.name for path in there.values() if not path.is_file()]
    return _foreign(*says(header, count, missing), code="identity.part-of-several")


def _by_type(header: Header) -> Identity | None:
    """Files of llama.cpp's that are no model, by `general.type`, and by what they hold where that is not said."""
    said, architecture = _string(header, "general.type"), _string(header, "general.architecture")
    names = [info.name for info in header.infos]
    if said == "imatrix" or (names and all(name.endswith((".in_sum2", ".counts", ".in_sum")) for name in names)):
        return _imatrix()
    if said == "adapter" or (names and all(name.endswith((".lora_a", ".lora_b")) for name in names)):
        by = "general.type" if said == "adapter" else "the names of its tensors"
        merge = "merge it into its base model (llama-export-lora -m BASE --lora FILE -o OUT)"
        return _lora(merge, f" (by {by})", _place(header, "general.type"))
    if architecture == "controlvector" or (names and all(name.startswith("direction.") for name in names)):
        return _layers("is a control vector, not a model", "give the model that it steers", code="identity.control-vector")
    if said == "mmproj" or architecture == "clip":
        return _layers(
            "is a multimodal projector (the eyes or ears of a model), not a model", "give the language model that it belongs to",
            code="identity.projector",
        )  # fmt: skip
    if not names and isinstance(header.value("tokenizer.ggml.tokens"), Strings):
        return _layers(
            "holds a vocabulary only, and no tensors", "give the model file; this one serves tests of tokenizers",
            code="identity.vocabulary-only",
        )  # fmt: skip
    return None


def _imatrix() -> Identity:
    return _layers(
        "is an importance matrix (imatrix), not a model", "give the model; this file serves llama-quantize --imatrix",
        code="identity.imatrix",
    )  # fmt: skip


def _lora(remedy: str, by: str = "", at: int | None = None) -> Identity:
    return _layers(f"is a LoRA adapter{by}, not a model", remedy, code="identity.lora-adapter", at=at)


def _by_types_of_tensors(header: Header) -> Identity | None:
    """Types that ggml gave up or never had. One such label alone may be a wrong label: that is for the layers to find."""
    met = [types.FOREIGN[info.code] for info in header.infos if info.code in types.FOREIGN]
    if len(met) < 2:
        return None
    first = max(set(met), key=met.count)
    says = f"{len(met)} of {len(header.infos)} tensors: type code {first.code} is {first.name}, {first.home}"
    if first.code in types.IK_CODES:
        return _foreign(says, first.remedy, code="identity.foreign-type")
    return _foreign(says, first.remedy, code="identity.removed-type")


def _spans(header: Header) -> Iterator[tuple[gguf.TensorInfo, int]]:
    """Tensors with the bytes that each takes; ends at the first that has no lawful size."""
    for info in header.infos:
        kind = types.lawful(info.code)
        if kind is None or 0 in info.ne or info.ne[0] % kind.block_elements:
            return
        yield info, kind.nbytes(info.ne[::-1])


def _by_layout(header: Header) -> Identity | None:
    """Whether the data is whole: the tensors one after the other as ggml lays them out, and the file long enough."""
    if header.parts:
        return next((found for part in header.parts if (found := _by_layout(part)) is not None), None)
    end = expected = counted = 0
    cut: gguf.TensorInfo | None = None
    for info, nbytes in _spans(header):
        if info.offset != expected:
            return _unpadded(header, info, expected)  # else a wrong offset, or a layout of its own: for the reader
        end = expected + nbytes
        expected = end + padding(end, header.alignment)
        counted += 1
        if cut is None and header.data_offset + end > header.file_size:
            cut = info
    if cut is None or counted < len(header.infos):
        return None
    whole = header.data_offset + end
    return _damaged(
        f"is cut off: the data ends at {header.file_size:,}, and {whole - header.file_size:,} of the file's {whole:,} bytes "
        "are missing", "the download broke off: go on with it, or fetch the file again", cut, code="identity.truncated",
    )  # fmt: skip


def _unpadded(header: Header, first: gguf.TensorInfo, expected: int) -> Identity | None:
    """Data whose every tensor begins where the one before it ends, `first` without the padding that it `expected` before it.

    Then each tensor's bytes are known, whether or not padding lies between some of them; the data may begin right behind the
    header, too. None for any other layout.
    """
    end = counted = 0
    for info, nbytes in _spans(header):
        if info.offset not in (end, end + padding(end, header.alignment)):
            return None
        end, counted = info.offset + nbytes, counted + 1
    if counted < len(header.infos):
        return None
    says = (
        f"has offset {first.offset}, expected {expected}: what lies before it was written without padding to "
        f"{header.alignment} bytes, and llama.cpp refuses such a file"
    )
    short = header.data_offset + end - header.file_size
    if short > 0 and short != header.data_offset - _end_of(header):
        return _damaged(
            f"{says}; {short:,} bytes are missing as well", "write it again from its source, with padding", first,
            code="identity.unpadded-and-cut",
        )  # fmt: skip
    return _damaged(says, "Try: aprlab repair FILE -o FIXED.gguf", first, code="identity.unpadded")


def _end_of(header: Header) -> int:
    """Where a header ends, before the padding that should follow it."""
    last = header.infos[-1]
    return last.at + 8 + len(last.name.encode("utf-8", "surrogateescape")) + 4 + 8 * len(last.ne) + 4 + 8


def unpadded(header: Header) -> tuple[AprlabError, Header] | None:
    """What is said of a file whose data lacks padding and is whole, and its header with the data where it is; else None."""
    found = None if header.parts else _by_layout(header)
    if found is None or found.error is None or found.code != "identity.unpadded":
        return None
    found.error.path = header.path
    end = max(info.offset + nbytes for info, nbytes in _spans(header))
    short = header.data_offset + end > header.file_size
    return found.error, replace(header, data_offset=_end_of(header)) if short else header


HANDLED = ", ".join(map(repr, ARCHITECTURES))


def _by_architecture(header: Header) -> Identity | None:
    name = header.value("general.architecture")
    if not isinstance(name, str):
        return None
    look = "inspect, diff, peel, convert and gates work on its file"
    experts = (number(header, f"{name}.expert_count") or 0) > 0 or any("_exps." in info.name for info in header.infos)
    if name.lower().endswith("moe") or experts:
        told = f"{name}.expert_count" if f"{name}.expert_count" in header.fields else "its architecture"
        return _layers(
            f"is a mixture of experts ({name!r}, by {told}); only models without experts are handled", look,
            code="identity.mixture-of-experts", at=_place(header, told),
        )  # fmt: skip
    if name in ARCHITECTURES:
        return None
    if name.lower() in ARCHITECTURES:
        return _layers(
            f"names its architecture {name!r}, where llama.cpp knows only {name.lower()!r}",
            f"set general.architecture to {name.lower()!r} where it is converted", code="identity.other-architecture",
            at=_place(header, "general.architecture"),
        )  # fmt: skip
    return _layers(
        f"is a model of architecture {name[:60]!r}; only {HANDLED} are handled", look, code="identity.other-architecture",
        at=_place(header, "general.architecture"),
    )  # fmt: skip


def _per_layer(header: Header) -> Identity | None:
    """Numbers that each layer has its own of, as pruned and searched models do; one number repeated is one number."""
    name = header.value("general.architecture")
    layers = header.value(f"{name}.block_count")
    for key in (starred.replace("*", str(name)) for starred in sorted(keys.PER_LAYER)):
        value = keys.one_number(key, header.value(key), layers)
        if isinstance(value, np.ndarray):
            shown = ", ".join(map(str, value[:4].tolist())) + (", …" if len(value) > 4 else "")
            if isinstance(layers, int) and len(value) != layers:
                return _layers(
                    f"key {key!r} is an array ([{shown}], {len(value)} in all) for {layers} layers, which llama.cpp refuses",
                    "convert it again from its source", code="identity.values-per-layer-count", at=_place(header, key),
                )  # fmt: skip
            return _layers(
                f"key {key!r} is an array ([{shown}], {len(value)} in all): a value for each layer, which is not handled",
                "a model with one number for all layers is", code="identity.values-per-layer",
                at=_place(header, key),
            )  # fmt: skip
    return None


__all__ = [
    "FILE_ONLY", "Identity", "file_only", "identify", "no_model", "of_gguf", "of_keys", "refusing", "something_else", "unpadded",
]  # fmt: skip
