"""Playbooks: which scenarios a model is put through, and what counts as passing. The schema is in `docs/qualification.md`.

A playbook is checked as a whole before anything runs; whatever is wrong is reported with its line.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aprlab import engines, paths
from aprlab.errors import FormatError, UsageError
from aprlab.formats import yaml_files as yamlfile
from aprlab.gates import GATES
from aprlab.qualification import oracles
from aprlab.qualification.terms import AREAS, ASKS, DOINGS, FORMATS

_LIMIT = 20_000  # characters of a prompt before it is filled up


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing that a model is put through, in each format.

    Attributes:
        id, area, why: name, one of `AREAS`, and what it is there for.
        kind: one of `ASKS` or `DOINGS`.
        prompt: what is asked: text, or messages (role, content) for ``talk``.
        expect: (oracle, argument) pairs; all have to hold.
        system, max_tokens, temperature, seed, stop: as for `aprlab.generate`.
        fill: text and count: that many copies are put before the prompt.
        repeat: ask so many times, with other questions in between; all answers must have the same tokens.
        restart: ask again in a fresh process; the answer must have the same tokens.
        source, target: formats of a ``convert``.
        gate: id of a ``gate``.
        timeout: seconds for all of it.
        line: its line in the playbook.
    """

    id: str
    area: str
    kind: str
    prompt: Any = ""
    expect: tuple[tuple[str, Any], ...] = ()
    why: str = ""
    system: str | None = None
    max_tokens: int = 24
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    fill: tuple[str, int] = ("", 0)
    repeat: int = 1
    restart: bool = False
    source: str = ""
    target: str = ""
    gate: str = ""
    timeout: float = 300.0
    line: int = 0

    @property
    def asks(self) -> bool:
        """It is answered by the model, and not about the file."""
        return self.kind in ASKS

    @property
    def once(self) -> bool:
        """It is done once for a model, and not in each format."""
        return self.kind in ("convert", "gate")

    @property
    def question(self) -> Any:
        """The prompt as the model gets it."""
        return self.fill[0] * self.fill[1] + self.prompt if self.fill[1] else self.prompt

    @property
    def words(self) -> str:
        """The prompt as a reader gets it, in one string."""
        if self.kind == "talk":
            return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.prompt)
        if self.kind == "convert":
            return f"{self.source} → {self.target}"
        if self.kind == "gate":
            return self.gate
        filled = f"[{self.fill[1]} × {self.fill[0]!r}] " if self.fill[1] else ""
        return filled + str(self.prompt) if self.asks else self.kind


@dataclass(frozen=True, slots=True)
class Playbook:
    """A named list of scenarios. `digest` changes when anything that could change a result does."""

    name: str
    title: str
    formats: tuple[str, ...]
    scenarios: tuple[Scenario, ...]
    golden: tuple[str, ...]  # what both sides of a conversion are asked
    about: str = ""
    engine: str = engines.AUTO  # where none is asked for
    path: Path | None = field(default=None, compare=False)

    @property
    def digest(self) -> str:
        """SHA-256 (16 digits) over the scenarios, without titles and lines."""
        rows = [{k: v for k, v in asdict(s).items() if k not in ("line", "why")} for s in self.scenarios]
        return hashlib.sha256(json.dumps([rows, self.golden], sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def names() -> list[str]:
    """The playbooks that come with the project."""
    return sorted(path.stem for path in (paths.data_dir() / "playbooks").glob("*.yaml"))


def find(name: str | Path) -> Path:
    """A path as it is; a bare name from the project's playbooks."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = paths.data_dir() / "playbooks" / f"{name}.yaml"
        if not path.is_file():
            said = f"there is no playbook {str(name)!r}; known: {', '.join(names())}"
            raise UsageError(said, code="playbook.unknown")
    return path


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

Check = Callable[[Any], str]  # what is wrong with a value, or ''


def _kind(what: str, *kinds: type, least: float | None = None, most: float = math.inf) -> Check:
    wanted = what
    if least is not None:
        wanted += f" from {least:g}" + (f" to {most:g}" if most < math.inf else "")

    def check(value: Any) -> str:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return f"must be {wanted}, got {value!r}"
        return "" if least is None or least <= float(str(value)) <= most else f"must be {wanted}, got {value!r}"

    return check


def _one_of(*known: str) -> Check:
    return lambda value: "" if isinstance(value, str) and value in known else f"unknown {value!r}; known: {', '.join(known)}"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return f"must be text, got {value!r}"
    return f"{len(value)} characters; at most {_LIMIT} are taken (use fill for more)" if len(value) > _LIMIT else ""


def _texts(value: Any) -> str:
    good = isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)
    return "" if good else f"must be a list of texts, got {value!r}"


def _formats(value: Any) -> str:
    if not isinstance(value, list) or not value or len(set(map(str, value))) != len(value):
        return f"must be a list of formats, each once, got {value!r}"
    return next((said for v in value if (said := _one_of(*FORMATS)(v))), "")


def _turns(value: Any) -> str:
    fits = isinstance(value, list) and value and all(
        isinstance(t, dict) and t.keys() == {"role", "content"} and all(isinstance(v, str) for v in t.values()) for t in value
    )
    return "" if fits else "must be a list of messages, each with role and content"


def _fill(value: Any) -> str:
    if not isinstance(value, dict) or value.keys() != {"text", "times"}:
        return f"must have text and times, got {value!r}"
    return _text(value["text"]) or _kind("a count", int, least=1, most=100_000)(value["times"])


def _id(value: Any) -> str:
    good = isinstance(value, str) and value and all(c.isascii() and (c.isalnum() or c in "-.") for c in value)
    return "" if good else f"must be letters, digits, - and ., got {value!r}"


_SETTINGS: dict[str, Check] = {
    "max_tokens": _kind("a whole number", int, least=1, most=4096),
    "timeout": _kind("seconds", int, float, least=0.1, most=86_400),
    "system": _text,
    "temperature": _kind("a number", int, float, least=0, most=10),
    "seed": _kind("a whole number", int, least=0),
    "stop": _texts,
}
def _engine(value: Any) -> str:
    try:
        engines.known(value if isinstance(value, str) else repr(value))
    except UsageError as error:
        return error.message
    return ""


_KEYS: dict[str, Check] = _SETTINGS | {
    "id": _id, "area": _one_of(*AREAS), "why": _text, "ask": _text, "complete": _text, "talk": _turns, "do": _one_of(*DOINGS),
    "expect": lambda value: "" if isinstance(value, list) and value else "must be a list of oracles",
    "fill": _fill, "repeat": _kind("a count", int, least=2, most=100), "restart": _kind("true or false", bool),
    "from": _one_of(*FORMATS), "to": _one_of(*FORMATS), "gate": _id,
}  # fmt: skip
_TOP: dict[str, Check] = {
    "name": _id, "title": _text, "about": _text, "formats": _formats, "golden": _texts, "engine": _engine,
    "defaults": _kind("settings", dict), "scenarios": lambda value: "" if isinstance(value, list) and value else "must be a list",
}  # fmt: skip


def load(name: str | Path) -> Playbook:
    """Read and check a playbook.

    Args:
        name: of one that comes with the project (`names()`), or the path of a YAML file.

    Raises:
        UsageError: there is none of that name.
        FormatError: it breaks the schema; the message says in which line and how.
    """
    path = find(name)
    data, line_of = yamlfile.load(path)

    def refuse(message: str, *keys: str | int, code: str) -> FormatError:
        return FormatError(f"line {line_of(*keys)}: {message}", code=code, path=path)

    def checked(value: Any, known: Mapping[str, Check], *at: str | int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(f"must be keys with values, got {value!r:.200}", *at, code="playbook.no-mapping")
        for key, item in value.items():
            if key not in known:
                raise refuse(f"unknown key {key!r}; known: {', '.join(known)}", *at, key, code="playbook.key-unknown")
            if said := known[key](item):
                raise refuse(f"{key}: {said}", *at, key, code="playbook.value")
        return value

    top = checked(data, _TOP)
    for key in ("name", "title", "formats", "scenarios"):
        if key not in top:
            raise refuse(f"{key} is missing", code="playbook.key-missing")
    defaults = checked(top.get("defaults", {}), _SETTINGS, "defaults")
    scenarios: list[Scenario] = []
    used: set[str] = set()
    for n, entry in enumerate(top["scenarios"]):
        at = ("scenarios", n)
        given = checked(entry, _KEYS, *at)
        for key in ("id", "area"):
            if key not in given:
                raise refuse(f"{key} is missing", *at, code="playbook.key-missing")
        if given["id"] in used:
            raise refuse(f"id {given['id']!r} again", *at, "id", code="playbook.id-again")
        used.add(given["id"])
        kinds = [key for key in (*ASKS, "do") if key in given]
        if len(kinds) != 1:
            said = f"expected exactly one of {', '.join((*ASKS, 'do'))}, got {', '.join(kinds) or 'none'}"
            raise refuse(said, *at, code="playbook.kind")
        scenarios.append(_scenario(given, kinds[0], defaults, at, line_of(*at), refuse))
    return Playbook(
        top["name"], top["title"], tuple(top["formats"]), tuple(scenarios),
        tuple(top.get("golden", ("What is 2+2?",))), top.get("about", ""), top.get("engine", engines.AUTO), path,
    )  # fmt: skip


def _scenario(
    given: dict[str, Any], kind: str, defaults: Mapping[str, Any], at: tuple[str | int, ...], line: int,
    refuse: Callable[..., FormatError],
) -> Scenario:  # fmt: skip
    settings = {**defaults, **{key: given[key] for key in _SETTINGS if key in given}}
    if "stop" in settings:
        settings["stop"] = tuple(settings["stop"])
    doing = given["do"] if kind == "do" else kind
    for key, of in {"from": "convert", "to": "convert", "gate": "gate"}.items():
        if (key in given) != (doing == of):
            raise refuse(f"{key} is needed for do: {of}, and allowed only there", *at, key, code="playbook.key-place")
    if doing == "convert" and given["from"] == given["to"]:
        raise refuse("from and to are the same", *at, "to", code="playbook.same-format")
    if doing == "gate" and given["gate"] not in GATES:
        raise refuse(f"unknown gate {given['gate']!r}; known: {', '.join(GATES)}", *at, "gate", code="playbook.gate-unknown")
    if kind == "do":
        for key in ("fill", "repeat", "restart"):
            if key in given:
                raise refuse(f"{key} has no use in do: {doing}", *at, key, code="playbook.key-useless")
    elif kind == "talk" and "fill" in given:
        raise refuse("fill has no use in talk", *at, "fill", code="playbook.key-useless")
    expect: list[tuple[str, Any]] = []
    prompt = given.get(kind, "") if kind != "do" else ""
    for m, item in enumerate(given.get("expect", ())):
        if not isinstance(item, dict) or len(item) != 1:
            raise refuse(f"must be one oracle and its argument, got {item!r:.200}", *at, "expect", m, code="playbook.expect")
        ((oracle, argument),) = item.items()
        if said := oracles.check(oracle, argument, doing, prompt):
            raise refuse(said, *at, "expect", m, code="playbook.expect")
        expect.append((oracle, argument))
    repeated = "repeat" in given or given.get("restart", False)
    if not expect and doing not in ("convert", "gate", "load") and not repeated:
        raise refuse("expect is missing: without an oracle nothing could fail", *at, code="playbook.expect-missing")
    fill = given.get("fill")
    return Scenario(
        id=given["id"], area=given["area"], kind=doing, prompt=prompt, expect=tuple(expect), why=given.get("why", ""),
        fill=(fill["text"], fill["times"]) if fill else ("", 0), repeat=given.get("repeat", 1),
        restart=given.get("restart", False), source=given.get("from", ""), target=given.get("to", ""),
        gate=given.get("gate", ""), line=line, **settings,
    )  # fmt: skip


__all__ = ["AREAS", "ASKS", "DOINGS", "FORMATS", "Playbook", "Scenario", "find", "load", "names"]
