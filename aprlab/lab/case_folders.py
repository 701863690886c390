"""Cases to hand over: a folder, and a zip of it, with an executed notebook, a page, a figure and the facts as JSON.

`make_case` runs the notebook where links to the files have their bare names, so that no path gets into it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import platform
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat

from aprlab import paths
from aprlab.display.plain_text import json_text
from aprlab.errors import UsageError
from aprlab.formats.leftovers import temporary_folder
from aprlab.formats.split import SHARD
from aprlab.formats.writing import atomic_folder, check_output, write_whole
from aprlab.lab import doctor
from aprlab.lab.case_notebooks import FIGURE, case_notebook, concluded, findings_of
from aprlab.lab.notebooks import NotebookError, execute, key_figure
from aprlab.lab.private_words import PrivateWords
from aprlab.model.hub import sha256
from aprlab.published import QUESTION
from aprlab.version import __version__

SCHEMA = 1  # of case.json; higher when a key goes or changes its meaning
NAMES = ("case.json", "case.ipynb", "case.html", "figure.png")  # all that a case may hold
_PACKAGES = (
    "numpy", "numba", "llvmlite", "gguf", "tokenizers", "matplotlib", "ipykernel", "nbconvert", "papermill", "jupyterlab",
    "xllamacpp", "transformers", "cupy-cuda12x", "cupy-cuda13x",
)  # fmt: skip
_RECORDING = (".yaml", ".yml", ".npz")  # sources that are files


@dataclass(frozen=True)
class Subject:
    """What a case is about.

    Attributes:
        kind: ``two`` files, ``one`` file, ``source``: programs on one model, or ``garbage``: a sentence.
        files: role -> path, of everything that has to lie next to the notebook.
        sources: names of programs, or paths of recordings.
        saw: what a broken program said.
        prompt, raw, engine, max_tokens: as `peel` and `forensics` take them.
    """

    kind: str
    files: Mapping[str, Path]
    sources: tuple[str, ...] = ()
    saw: str = ""
    prompt: str = QUESTION
    raw: bool = False
    engine: str = "auto"
    max_tokens: int = 12

    def parameters(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Of the notebook; `names` has the name of each file in the notebook's folder, by role."""
        if self.kind in ("two", "one"):
            files = {role: names.get(role, "") for role in ("reference", "candidate")}
            return {**files, "engine": self.engine, "prompt": self.prompt, "max_tokens": self.max_tokens}
        if self.kind == "source":
            sources = [names.get(f"source {n}", spec) for n, spec in enumerate(self.sources)]
            return {"model": names["model"], "sources": sources, "prompt": self.prompt}
        asked = {"saw": self.saw, "prompt": self.prompt, "raw": self.raw, "engine": self.engine}
        return {"model": names["model"], **asked}

    def command(self, names: Mapping[str, str]) -> list[str]:
        """What is typed after ``aprlab`` to get the same verdict without a case, or the case itself after ``case new``."""
        files = [names[role] for role in ("reference", "candidate", "model") if role in names]
        words = [*files]
        for n, spec in enumerate(self.sources):
            words += ["--source", names.get(f"source {n}", spec)]
        if self.kind == "garbage":
            words += ["--saw", self.saw, *(["--raw"] if self.raw else [])]
        if self.prompt != QUESTION:
            words += ["--prompt", self.prompt]
        return [*words, *(["--engine", self.engine] if self.engine != "auto" else [])]


def subject(
    files: Sequence[Path], *, saw: str | None = None, sources: Sequence[str] = (), prompt: str = QUESTION, raw: bool = False,
    engine: str = "auto",
) -> Subject:  # fmt: skip
    """What a case of these files is about.

    Args:
        files: reference and candidate, one file to judge alone, or with `saw` or `sources` one model.
        saw: a garbage sentence.
        sources: programs to judge on the model.
        prompt, raw, engine: as `Subject` has them.

    Raises:
        UsageError: another number of files, a sentence and programs, a file that is not there.
    """
    alone = saw is not None or bool(sources)
    if saw is not None and sources:
        raise UsageError("a sentence and programs are two cases: make one of each", code="case.sentence-and-programs")
    if not 1 <= len(files) <= (1 if alone else 2):
        wanted = "one model beside --saw or --source" if alone else "[REF] CAND"
        raise UsageError(f"a case needs {wanted}, not {len(files)} files", code="case.files")
    for path in files:
        if not path.exists():
            raise UsageError("there is no such file", code="cli.no-such-file", path=path)
    if saw is not None:
        return Subject("garbage", {"model": files[0]}, saw=saw, prompt=prompt, raw=raw, engine=engine)
    if sources:
        recorded = {f"source {n}": Path(spec) for n, spec in enumerate(sources) if spec.endswith(_RECORDING)}
        for path in recorded.values():
            if not path.is_file():
                raise UsageError("there is no such file", code="cli.no-such-file", path=path)
        return Subject("source", {"model": files[0], **recorded}, tuple(sources), prompt=prompt)
    roles = ("reference", "candidate") if len(files) == 2 else ("candidate",)
    return Subject("two" if len(files) == 2 else "one", dict(zip(roles, files, strict=True)), prompt=prompt, engine=engine)


@dataclass(frozen=True)
class MadeCase:
    """A case that was written: its folder, its zip, and what is in its JSON."""

    folder: Path
    archive: Path
    facts: dict[str, Any]


def make_case(of: Subject, output: Path, *, force: bool = False, progress: bool = False) -> MadeCase:
    """Run the notebook of a case and write the folder `output` and ``output.zip``, each whole or not at all.

    Args:
        of: as `subject` gives it.
        output: the folder; a case that is there already is replaced with `force` alone.
        progress: a bar.

    Raises:
        UsageError: the output is there, or cannot be written.
        NotebookError: the notebook did not run to its end; nothing was written.
    """
    archive = output.with_name(f"{output.name}.zip")
    check_output(archive, list(of.files.values()), force=force)
    words = PrivateWords((path.parent for path in of.files.values()), of.sources)
    with atomic_folder(output, force=force, ours=NAMES.__contains__) as made:
        with temporary_folder("aprlab-case-") as work:
            names = _laid_out(of, work)
            notebook = _executed(of, names, work, progress)
        found = findings_of(notebook)
        facts = words.within(_facts(of, names, found))
        for cell in notebook.cells:
            cell.source = words.without(cell.source)  # the address of a server is one of its parameters
            words.of_outputs(cell.get("outputs", []))
        concluded(notebook, facts["title"], facts["conclusion"], list(facts["names"]), facts["commands"][0])
        parts = _parts(notebook, facts)
        facts["contents"] = [
            {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in parts.items()
        ]
        parts = {"case.json": (json_text(facts, indent=1) + "\n").encode("utf-8", "backslashreplace"), **parts}
        for name, data in parts.items():
            write_whole(made / name, data)
    write_whole(archive, _zipped(output.name, parts))
    return MadeCase(output, archive, facts)


def _laid_out(of: Subject, work: Path) -> dict[str, str]:
    """Links to the files under their bare names in `work`; the name of each by role."""
    names: dict[str, str] = {}
    for role, path in of.files.items():
        place = work / path.name
        if place.is_symlink() and not place.samefile(path):  # two files of one name
            (work / role).mkdir()
            place = work / role / path.name
        for each in _together(path):
            link = place.with_name(each.name)
            if not link.is_symlink():
                link.symlink_to(each.resolve())
        names[role] = str(place.relative_to(work))
    return names


def _together(path: Path) -> list[Path]:
    """A file with those that it cannot be read without: the parts of a split model, the arrays next to a mapping."""
    if path.suffix in (".yaml", ".yml"):
        return sorted(path.resolve().parent.iterdir())
    if (named := SHARD.fullmatch(path.name)) is not None:
        return [each for each in sorted(path.parent.iterdir()) if _same_model(named, SHARD.fullmatch(each.name))]
    return [path]


def _same_model(one: re.Match[str], other: re.Match[str] | None) -> bool:
    return other is not None and (one[1], one[3], one[4]) == (other[1], other[3], other[4])


def _executed(of: Subject, names: Mapping[str, str], work: Path, progress: bool) -> nbformat.NotebookNode:
    source, done = work / "case.ipynb", work / "executed.ipynb"
    nbformat.write(case_notebook(of.kind, of.parameters(names)), source)
    failure = execute(source, done, {}, progress, work)
    if failure:
        raise NotebookError(f"the case could not be made: {failure}", code="case.notebook-failed")
    notebook = nbformat.read(done, 4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags" and value}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _facts(of: Subject, names: Mapping[str, str], found: Mapping[str, Any]) -> dict[str, Any]:
    """What is in case.json; `contents` comes later."""
    typed = of.command(names)
    verb = "forensics" if of.kind == "garbage" else "peel"
    commands = [shlex.join(["aprlab", "case", "new", *typed]), shlex.join(["aprlab", verb, *typed])]
    sides = [names[role] for role in ("reference", "candidate", "model") if role in names]
    with_ = {"two": " against ".join(sides), "one": f"{sides[0]} alone", "source": f"{', '.join(of.sources)} on {sides[0]}"}
    return {
        "schema": SCHEMA,
        "kind": of.kind,
        "title": with_.get(of.kind, f"Which bug makes {sides[0]} say {of.saw[:60]!r}?"),
        "conclusion": found["conclusion"],
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"aprlab": __version__, "python": platform.python_version(), **dict(_versions())},
        "environment": _environment(),
        "names": list(dict.fromkeys(names.values())),
        "files": [_file(role, path, names[role]) for role, path in of.files.items()],
        "commands": [*commands, *([found["next"]] if found["next"] else [])],
        "asked": of.parameters(names),
        "findings": {key: value for key, value in found.items() if key not in ("conclusion", "next")},
    }


def _file(role: str, path: Path, name: str) -> dict[str, Any]:
    size, digest = fingerprint(path)
    return {"role": role, "name": name, "bytes": size, "sha256": digest}


def fingerprint(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file; of a folder, and of a split model, of the list of hashes of its files, by name."""
    if path.is_file():
        together = [each for each in _together(path) if SHARD.fullmatch(each.name)]
        if len(together) < 2:
            return path.stat().st_size, sha256(path)
    else:
        together = sorted(each for each in path.iterdir() if each.is_file())
    lines = "".join(f"{sha256(each)}  {each.name}\n" for each in together)
    return sum(each.stat().st_size for each in together), hashlib.sha256(lines.encode()).hexdigest()


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _environment() -> dict[str, Any]:
    machine = {"system": platform.system(), "machine": platform.machine(), "cores": paths.cores()}
    return {**machine, "instructions": doctor.instructions().detail, "gpu": doctor.gpu().detail}


def _parts(notebook: nbformat.NotebookNode, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the folder but the JSON."""
    from aprlab.lab.case_pages import case_page

    figure = base64.b64decode(key_figure(notebook))
    assert figure, f"the cell tagged {FIGURE} drew nothing"
    text = nbformat.writes(notebook) + "\n"
    return {"case.ipynb": text.encode(), "case.html": case_page(notebook, facts).encode(), "figure.png": figure}


def _zipped(folder: str, parts: Mapping[str, bytes]) -> bytes:
    """The folder as a zip; no owner, no time of day."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            entry = zipfile.ZipInfo(f"{folder}/{name}")
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data)
    return packed.getvalue()


__all__ = ["NAMES", "SCHEMA", "MadeCase", "Subject", "fingerprint", "make_case", "subject"]
