"""A case that somebody sent: read within bounds, whatever its bytes are, and compared with the files at hand.

Nothing is unpacked and nothing of it is run.
"""

from __future__ import annotations

import hashlib
import stat
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from aprlab.errors import FormatError, UsageError
from aprlab.formats.reading import json_object, open_regular, read_bytes
from aprlab.lab.case_folders import NAMES, SCHEMA, fingerprint

MOST = 32 << 20  # bytes of one part of a case
_ENTRIES = 64  # of a zip
State = Literal["same", "other", "not here"]
# key -> the type that it must have; lists have objects with the keys of `_ROWS`
_KEYS: dict[str, type] = {
    "schema": int, "kind": str, "title": str, "conclusion": str, "made": str, "versions": dict, "environment": dict,
    "names": list, "files": list, "commands": list, "asked": dict, "findings": dict, "contents": list,
}  # fmt: skip
_ROWS: dict[str, dict[str, type]] = {
    "files": {"role": str, "name": str, "bytes": int, "sha256": str},
    "contents": {"name": str, "bytes": int, "sha256": str},
}


@dataclass(frozen=True)
class ReadCase:
    """A case as it was received.

    Attributes:
        path: folder or zip.
        facts: what its JSON has.
        parts: name -> ``same`` as when it was made, ``other``, or ``not here``.
    """

    path: Path
    facts: dict[str, Any]
    parts: dict[str, State]

    @property
    def whole(self) -> bool:
        """Every part is what was written when the case was made."""
        return set(self.parts.values()) == {"same"}


@dataclass(frozen=True)
class FileAtHand:
    """One file of a case, and what is here under its name: `state` tells whether it is the same by hash."""

    role: str
    name: str
    state: State
    path: Path | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"role": self.role, "name": self.name, "state": self.state, "path": None if self.path is None else str(self.path)}


def read_case(path: Path) -> ReadCase:
    """A folder or a zip that `make_case` wrote, or that claims to be one.

    Raises:
        UsageError: there is nothing, or no regular file.
        FormatError: no case: not a zip, parts too large, entries outside its folder, JSON of another form or schema.
    """
    if path.is_dir():
        read = _from_folder(path)
    elif path.exists():
        read = _from_zip(path)
    else:
        raise UsageError("there is no such case", code="case.not-there", path=path)
    data = read("case.json")
    if data is None:
        raise FormatError("is no case: it has no case.json", code="case.no-json", path=path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"case.json is not UTF-8: {error.reason}", code="case.not-utf8", path=path) from None
    facts = json_object(text, "case.json", path)
    _check(facts, path)
    parts: dict[str, State] = {}
    for row in facts["contents"]:
        there = read(row["name"]) if row["name"] in NAMES else None
        same = there is not None and hashlib.sha256(there).hexdigest() == row["sha256"]
        parts[row["name"]] = "not here" if there is None else "same" if same else "other"
    return ReadCase(path, facts, parts)


def files_at_hand(case: ReadCase, given: Sequence[Path] = ()) -> list[FileAtHand]:
    """For each file of the case, whether it is here: among `given`, else in the current folder, else next to the case.

    Raises:
        UsageError: a given file is not there, or has the name of none of the case's.
    """
    known = {PurePosixPath(row["name"]).name for row in case.facts["files"]}
    for path in given:
        if not path.exists():
            raise UsageError("there is no such file", code="cli.no-such-file", path=path)
        if path.name not in known and len(given) != len(case.facts["files"]):
            raise UsageError(
                f"the case has no file of this name; it has {', '.join(sorted(known))}", code="case.other-name", path=path
            )
    found = []
    for n, row in enumerate(case.facts["files"]):
        name = PurePosixPath(row["name"]).name
        places = [each for each in given if each.name == name] or ([given[n]] if len(given) == len(case.facts["files"]) else [])
        if not given and name not in ("", ".", ".."):
            places = [folder / name for folder in (Path(), case.path.parent, case.path) if (folder / name).exists()]
        if not places:
            found.append(FileAtHand(row["role"], row["name"], "not here", None))
            continue
        same = fingerprint(places[0]) == (row["bytes"], row["sha256"])
        found.append(FileAtHand(row["role"], row["name"], "same" if same else "other", places[0]))
    return found


_Read = Callable[[str], bytes | None]


def _from_folder(path: Path) -> _Read:
    def read(name: str) -> bytes | None:
        part = path / name
        try:
            return read_bytes(part, MOST)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", code="case.cannot-read", path=part) from None

    return read


def _from_zip(path: Path) -> _Read:
    """Parts by their bare names. All of them lie in one folder, or none does; whatever the headers say, `MOST` holds."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) > _ENTRIES:
                raise FormatError(f"is no case: {len(entries)} entries", code="case.too-many-entries", path=path)
            found: dict[str, bytes] = {}
            for entry in entries:
                name = _bare(entry, path)
                if name in found:
                    raise FormatError(f"is no case: {name} is there twice", code="case.part-twice", path=path)
                if name in NAMES:
                    with archive.open(entry) as part:
                        found[name] = part.read(MOST + 1)
                    if len(found[name]) > MOST:
                        raise FormatError(f"is no case: {name} has more than {MOST} bytes", code="case.too-large", path=path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise FormatError(f"is no zip that can be read: {error}", code="case.bad-zip", path=path) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", code="case.cannot-read", path=path) from None
    return found.get


def _bare(entry: zipfile.ZipInfo, path: Path) -> str:
    """The name of an entry without its folder; raises where it leads out of it, or is no regular file."""
    parts = entry.filename.split("/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    plain = kind in (0, stat.S_IFREG) and not entry.is_dir() and not set(entry.filename) & {"\\", ":", "\0"}
    if not plain or len(parts) > 2 or any(part in ("", ".", "..") for part in parts):
        raise FormatError(f"is no case: entry {entry.filename[:80]!r}", code="case.bad-entry", path=path)
    return parts[-1]


def _check(facts: Mapping[str, Any], path: Path) -> None:
    """Every key and its type; raises FormatError for another schema, and where one is missing or of another kind."""
    schema = facts.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise FormatError(f"case.json has schema {schema}; this aprlab knows {SCHEMA}", code="case.schema", path=path)
    for key, kind in _KEYS.items():
        if type(facts.get(key)) is not kind:
            raise FormatError(f"case.json: {key!r} is no {kind.__name__}", code="case.bad-key", path=path)
    for key, columns in _ROWS.items():
        for row in facts[key]:
            if type(row) is not dict or any(type(row.get(name)) is not kind for name, kind in columns.items()):
                raise FormatError(f"case.json: a row of {key!r} has not {', '.join(columns)}", code="case.bad-row", path=path)
    if not all(type(line) is str for line in (*facts["commands"], *facts["names"])):
        raise FormatError("case.json: commands and names are texts", code="case.bad-key", path=path)


__all__ = ["FileAtHand", "ReadCase", "files_at_hand", "read_case"]
