"""Model files to choose from, and a file's tensors as they stand, however broken the file is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from aprlab import paths
from aprlab.errors import AprlabError
from aprlab.formats import apr, open_model
from aprlab.formats.raw import Piece, look
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor

SUFFIXES = (".gguf", ".apr", ".safetensors")


def known_files(extra: Mapping[str, str | Path] | None = None) -> dict[str, Path]:
    """Label -> path: the embedded model, the real ones on this machine, and `extra`."""
    found = {"embedded (tiny)": paths.embedded_model()}
    folder = paths.models_dir()
    if folder.is_dir():
        found |= {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".gguf", ".apr")}
    return found | {label: Path(path) for label, path in (extra or {}).items()}


def nearby(folder: str | Path = ".", most: int = 200) -> list[str]:
    """Model files in a folder and one level below it, as paths from there: what a picker offers."""
    place = Path(folder)
    try:
        found = [path for pattern in ("*", "*/*") for path in sorted(place.glob(pattern)) if path.suffix in SUFFIXES]
    except OSError:
        return []
    return [str(path) for path in found if path.is_file() and not path.name.startswith(".")][:most]


def shown(path: Path) -> str:
    """What a picker calls a file: by the label of a known one, else from here, else in full."""
    for label, known in known_files().items():
        if known == path:
            return label
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Names that tell the files apart: without folders where that is enough."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


@dataclass
class Side:
    """One file: what a strict reader makes of it, or else what is in it.

    Attributes:
        label: how it is called on the screen.
        path: the file.
        refusal: why the strict reader refuses it; empty where it does not.
        tensors: by GGUF name (by the name in the file if it is unknown), each with the type that its label and its
            size allow. A piece that no type fits is in `unreadable`.
        unreadable: name -> the piece, as the index has it.
    """

    label: str
    path: Path
    refusal: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    unreadable: dict[str, Piece] = field(default_factory=dict)
    model: Model | None = None

    @classmethod
    def open(cls, path: str | Path, label: str = "") -> Side:
        """Raises UsageError, FormatError or UnsupportedError where not even an index can be read."""
        path = Path(path)
        side = cls(label or path.name, path)
        try:
            side.model = open_model(path)
            side.tensors = side.model.tensors
        except AprlabError as error:
            side.refusal = str(error).replace(str(path), path.name)
            for piece in look(path).pieces:
                side._take(piece)
        return side

    @classmethod
    def open_all(cls, paths: Sequence[str | Path]) -> list[Side]:
        """Several files, by path or by the label of a known one, under names that tell them apart.

        Raises:
            UsageError, FormatError, UnsupportedError: as `open`; nothing else was opened for long.
        """
        known = known_files()
        given = [known.get(str(path).strip(), Path(str(path).strip())) for path in paths]
        return [cls.open(path, label) for path, label in zip(given, labels_of(given), strict=True)]

    def _take(self, piece: Piece) -> None:
        name = piece.stated if piece.stated is not None and piece.stated not in self.tensors else piece.name
        kinds = [kind for kind in piece.fitting() if kind.fits(piece.shape, len(piece.raw))]
        if kinds:
            origin = Origin(self.path, piece.name, piece.offset)
            self.tensors[name] = Tensor(name, kinds[0], piece.shape, piece.raw, origin)
        else:
            self.unreadable[name] = piece

    @cached_property
    def names(self) -> list[str]:
        """All names, in the order of the file."""
        return [*self.tensors, *self.unreadable]

    def type_of(self, name: str) -> str:
        """Name of the type, or what the label says where no type fits; '' where there is no such tensor."""
        if name in self.tensors:
            return self.tensors[name].type.name
        if name in self.unreadable:
            piece = self.unreadable[name]
            meant = "/".join(kind.name for kind in apr.candidates(piece.code)) or "unknown"
            return f"label {piece.code} ({meant})"
        return ""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Rows first; () where there is no such tensor."""
        found = self.tensors.get(name) or self.unreadable.get(name)
        return found.shape if found is not None else ()

    def nbytes_of(self, name: str) -> int:
        """Bytes that are there."""
        found = self.tensors.get(name) or self.unreadable.get(name)
        return len(found.raw) if found is not None else 0


__all__ = ["SUFFIXES", "Side", "known_files", "labels_of", "nearby", "shown"]
