"""What `peel` answers: findings, where two runs part, the smallest repair, and the proof of it.

The JSON form is documented in `docs/peel.md`; its keys are a promise.
"""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aprlab.display.html import Cell, folded, table
from aprlab.faults import Fault
from aprlab.onion.words import Mechanism

Word = Literal["same", "equivalent", "healthy", "suspect", "broken", "unproved", "ambiguous", "not-comparable"]
SCHEMA = 3  # of the JSON; higher when a key goes or changes its meaning
_SHOWN = 12  # findings that a terminal is given; pages and JSON have all
EXIT = {
    "same": 0, "equivalent": 0, "healthy": 0, "broken": 3, "suspect": 4, "unproved": 4, "ambiguous": 4, "not-comparable": 4,
}  # fmt: skip
MEANING: dict[Word, str] = {  # in a sentence, for a card; docs/peel.md has the promises in full
    "same": "Nothing differs that a run uses; what both run was run, and every logit is the same, bit for bit.",
    "equivalent": "The bytes differ within what their types may cost; both were run.",
    "healthy": "It was run, and every test of health passed.",
    "suspect": "Something is unlikely; nothing is proved.",
    "broken": "Proved: the findings say what is wrong, and where.",
    "unproved": "It was not run, or it is not known how such a model speaks: nothing is said of its health.",
    "ambiguous": "More than one explanation is left, and the bytes cannot decide.",
    "not-comparable": "No statement is possible; the findings say why.",
}
LAYERS = ("container", "naming", "dtype", "layout", "decode", "weights", "config", "tokenizer", "forward", "instrument")


@dataclass
class Finding:
    """One thing that is wrong (or, where `harmless`, merely other).

    Attributes:
        layer: one of `LAYERS`.
        fault: id in the catalogue, or None where the mechanism is none of the known ones.
        tensors: GGUF names; empty where no tensor is concerned.
        cause: what was done to what, as a code with parameters.
        evidence: figures and facts, plain JSON values and mechanisms.
        confidence: 1.0 where bytes were reproduced exactly, less where statistics had to decide.
        harmless: a difference that changes nothing that a run could notice.
        ambiguous: more than one explanation is left, and the bytes cannot decide.
    """

    layer: str
    fault: str | None
    tensors: list[str]
    cause: Mechanism
    evidence: dict[str, Any] = field(default_factory=dict)
    confidence: float = 1.0
    harmless: bool = False
    ambiguous: bool = False

    def __post_init__(self) -> None:
        if self.layer not in LAYERS:
            raise ValueError(f"unknown layer {self.layer!r}")

    @property
    def code(self) -> str:
        """Of the cause; stable."""
        return self.cause.code

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Of the cause."""
        return self.cause.parameters

    @property
    def mechanism(self) -> str:
        """The cause in words, for people."""
        return str(self.cause)

    @property
    def label(self) -> str:
        """What programs call it in one verdict: `naming/GH-190`, or the cause where no id is known."""
        return f"{self.layer}/{self.fault}" if self.fault is not None else self.cause.label

    def to_json(self) -> dict[str, Any]:
        """The keys of the schema."""
        names = (
            "layer", "fault", "code", "parameters", "tensors", "mechanism", "evidence", "confidence", "harmless",
            "ambiguous",
        )  # fmt: skip
        found: dict[str, Any] = plain({name: getattr(self, name) for name in names})
        return found

    def __str__(self) -> str:
        where = f" [{some(self.tensors)}]" if self.tensors else ""
        return f"{self.layer}: {self.fault or 'no known fault'}: {self.mechanism}{where}"


def known(fault: Fault) -> Mechanism:
    """The cause of a finding that a fault of the catalogue explains."""
    return Mechanism("catalogue.fault", {"fault": fault.id})


@dataclass
class Repair:
    """The smallest set of fixes that restores the golden rule.

    Attributes:
        set: labels of the findings that were fixed, in the order of the findings.
        minimal: leaving out any one of them breaks the golden rule (tried, not assumed).
        proof: what was run before and after.
    """

    set: list[str]
    minimal: bool
    proof: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"set": self.set, "minimal": self.minimal, "proof": plain(self.proof)}


@dataclass
class Verdict:
    """The answer of `peel`.

    Attributes:
        verdict: ``same`` (nothing differs that matters), ``equivalent`` (other bytes, the same model within what its
            types can hold), ``broken``, ``ambiguous`` (the bytes cannot decide between explanations),
            ``not-comparable`` (no statement is possible, and `findings` say why). Of one file without a reference:
            ``healthy`` (it was run, and every test of health passed), ``suspect`` (something is unlikely, nothing is
            proved), ``broken``, ``unproved`` (it could not be run, or not be judged by what it says).
        findings: in the order of the layers, cheapest first.
        first_divergence: first trace point at which the two runs differ, or None.
        repair: the smallest set of repairs, or None where nothing is broken or nothing helps.
        instruments: each instrument -> true if it distinguished a known pair, else how it failed.
        seconds: by stage.
        compared: what was compared with what: ``reference`` (None: nothing) and ``candidate``.
        health: figures of the tests of one file alone; empty with a reference, or where it could not be run.
        cost: of two sides that are the same or equivalent, what the run showed: ``ids``, ``tokens``, ``text``, ``bitwise``,
            ``distance`` and ``kl`` (nats) of the logits, ``same_token`` of ``steps``; where types differ, also
            ``distance_allowed`` and ``kl_allowed``. Empty where nothing was run.
        engine, engine_asked: which engine ran the files (empty: nothing was run, or two engines were compared), and what was
            asked for.
        not_looked_at: layer -> why nothing is said of it; empty where every layer was looked at.
    """

    verdict: Word
    findings: list[Finding]
    first_divergence: dict[str, Any] | None = None
    repair: Repair | None = None
    instruments: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    title: str = ""
    compared: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    engine: str = ""
    engine_asked: str = ""
    not_looked_at: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 same, equivalent or healthy; 3 broken; 4 whatever is not proved: suspect, unproved, ambiguous, not comparable."""
        return EXIT[self.verdict]

    @property
    def cost_in_words(self) -> str:
        """What the run cost, on one line; empty where nothing was run, or where nothing was lost."""
        cost = self.cost
        if not cost or cost.get("bitwise", True):
            return ""
        most = f", at most {cost['kl_allowed']:.3g} for these types" if "kl_allowed" in cost else ""
        same = f"the same token at {cost['same_token']} of {cost['steps']} steps"
        return f"KL {cost['kl']:.3g} nats of the next token{most}; {same}; logits {cost['distance']:.3g} away"

    @property
    def alone(self) -> bool:
        """Whether the candidate was judged without a reference."""
        return self.compared.get("reference", "") is None

    @property
    def faults(self) -> list[str]:
        """Ids of the catalogue that were found, each once."""
        return list(dict.fromkeys(f.fault for f in self.findings if f.fault is not None))

    def to_json(self) -> dict[str, Any]:
        """The documented schema."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "compared": plain(self.compared),
            "engine": self.engine or None,
            "engine_asked": self.engine_asked or None,
            "findings": [finding.to_json() for finding in self.findings],
            "first_divergence": plain(self.first_divergence),
            "repair": None if self.repair is None else self.repair.to_json(),
            "health": plain(self.health),
            "cost": plain(self.cost),
            "not_looked_at": dict(self.not_looked_at),
            "instruments": plain(self.instruments),
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.verdict}" if self.title else self.verdict]
        for finding in self.findings[:_SHOWN]:
            lines.append(f"  {finding}")
            lines += [f"    {key}: {short(value)}" for key, value in finding.evidence.items()]
        if len(self.findings) > _SHOWN:
            lines.append(f"  and {len(self.findings) - _SHOWN} findings more, all of them in the JSON")
        lines += [f"  {key}: {short(value)}" for key, value in self.health.items()]
        if words := self.cost_in_words:
            lines.append(f"  cost: {words}")
        if self.first_divergence is not None:
            lines.append("  first divergence: " + ", ".join(f"{k} {short(v)}" for k, v in self.first_divergence.items()))
        if self.repair is not None:
            size = "smallest repair" if self.repair.minimal else "repair"
            lines.append(f"  {size}: {some(self.repair.set, _SHOWN) or 'none needed'}")
            lines += [f"    {key}: {short(value)}" for key, value in self.repair.proof.items()]
        for why in dict.fromkeys(self.not_looked_at.values()):
            layers = ", ".join(layer for layer, reason in self.not_looked_at.items() if reason == why)
            lines.append(f"  not looked at: {layers}: {why}")
        void = [name for name, ok in self.instruments.items() if ok is not True]
        if void:
            lines.append(f"  instruments that failed their own test, whose findings are void: {', '.join(void)}")
        lines.append(f"  {sum(self.seconds.values()):.2f} s")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A card: the verdict in a sentence, what was found, the proof, and the next step to copy; figures are folded."""
        rows, evidence = [], []
        for f in self.findings:
            word = Cell(f.fault or "no known fault", "mild" if f.harmless else "open" if f.ambiguous else "bad")
            rows.append([f.layer, word, f.mechanism, some(f.tensors)])
            evidence += [[f.layer, f.fault or "–", key, short(value)] for key, value in f.evidence.items()]
            evidence.append([f.layer, f.fault or "–", "confidence", f"{f.confidence:.2f}"])
        head = Cell(f"{self.title}: {self.verdict}".lstrip(": "), self.tone)
        parts = [f'<div style="font-size:110%;font-weight:bold">{head.html()}</div>']
        if self.verdict in MEANING:
            parts.append(f"<div>{html.escape(MEANING[self.verdict])}</div>")
        if rows:
            parts.append(table(("layer", "fault", "what was done", "where"), rows))
        if words := self.cost_in_words:
            parts.append(f"<div><b>cost</b> {html.escape(words)}</div>")
        if self.repair is not None:
            size = "smallest repair" if self.repair.minimal else "repair"
            parts.append(f"<div><b>{size}</b> {html.escape(', '.join(self.repair.set) or 'none needed')}</div>")
        for layer, why in self.not_looked_at.items():
            parts.append(f"<div><b>not looked at: {html.escape(layer)}</b> {html.escape(why)}</div>")
        if self.next_step:
            parts.append(f'<div><b>next</b> <code style="user-select:all">{html.escape(self.next_step)}</code></div>')
        folds = {
            "evidence of each finding": (("layer", "fault", "", ""), evidence),
            "tests of health": (("", ""), [[key, short(plain(value))] for key, value in self.health.items()]),
            "first divergence": (("", ""), [[k, short(plain(v))] for k, v in (self.first_divergence or {}).items()]),
            "proof of the repair": (
                ("", ""), [[k, short(v)] for k, v in (self.repair.proof if self.repair is not None else {}).items()],
            ),
        }  # fmt: skip
        parts += [folded(title, table(columns, lines)) for title, (columns, lines) in folds.items() if lines]
        colour = {"good": "#00735c", "bad": "#b3400a"}.get(self.tone, "#8a5a00")
        return f'<div style="border-left:4px solid {colour};padding:4px 12px">{"".join(parts)}</div>'

    @property
    def next_step(self) -> str:
        """The command that goes on from here; '' where there is none."""
        reference, candidate = (str(self.compared.get(side) or "") for side in ("reference", "candidate"))
        suffix = Path(candidate).suffix
        if suffix not in (".gguf", ".apr") or self.exit_code == 0:  # else two engines, or nothing is wrong
            return ""
        if self.repair is not None and self.repair.set:
            line = ["aprlab", "repair", candidate, "-o", f"fixed{suffix}"]
            return shlex.join([*line, *(["--reference", reference] if reference else [])])
        return "" if reference else shlex.join(["aprlab", "peel", "REFERENCE", candidate])

    @property
    def tone(self) -> str:
        """How a page shows the word: ``good``, ``bad``, or ``open`` where no statement is possible."""
        return {0: "good", 3: "bad"}.get(self.exit_code, "open")


def plain(value: Any) -> Any:
    """Plain JSON values: NumPy's as Python's, tuples as lists, mechanisms with their words, what is not finite as a word."""
    if isinstance(value, Mechanism):
        return {"code": value.code, "parameters": plain(value.parameters), "words": str(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def some(names: Iterable[str], most: int = 4) -> str:
    """The names, or the first few and how many more."""
    listed = list(names)
    return ", ".join(listed) if len(listed) <= most else f"{', '.join(listed[:most])} and {len(listed) - most} more"


def short(value: Any) -> str:
    """A value on one line, cut where it is long."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        text = ", ".join(f"{key} {short(item)}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(short(item) for item in value)
    else:
        text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}…"
