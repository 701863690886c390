"""The certificate of a conversion: is MODEL what a right conversion makes of SOURCE, and how sure is that?

Nothing is measured here in a way of its own. `peel` says what differs between the files and whether a run agrees; the tensors
are those that its layers compared row by row; the prompts go through the sessions' own templates. What is added is a text that
both read, long enough for figures with intervals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from aprlab import cluster
from aprlab.display.html import Cell, table
from aprlab.engines import choose
from aprlab.errors import BROKEN, AprlabError, reason
from aprlab.formats import open_model
from aprlab.inference.session import Session, session_beside
from aprlab.inference.template import render
from aprlab.instruments.shares import Share, shares
from aprlab.model.model import Model
from aprlab.onion.file_case import FileCase
from aprlab.onion.peeling import examine, golden_of
from aprlab.onion.row_errors import RowErrors
from aprlab.onion.run_cost import losses
from aprlab.onion.verdict import Verdict, plain, some
from aprlab.published import QUESTION
from aprlab.qualification.certificate_words import TITLES, words
from aprlab.qualification.modelfile_check import modelfile_problems
from aprlab.qualification.text_reading import (
    Reading,
    affordable,
    certificate_text,
    foretold,
    interval,
    long_window,
    read,
    read_by,
    windows,
)
from aprlab.tracing.golden_rule import MAX_TOKENS
from aprlab.version import __version__

SCHEMA = 1
Word = Literal["certified", "not certified", "not enough evidence"]
SIGNS = {True: "pass", False: "FAIL", None: "open"}
EXIT: dict[Word, int] = {"certified": 0, "not certified": 3, "not enough evidence": 4}

RUNS = ("prompts", "text", "long context")  # the checks that need both sides to run
# How far the candidate may be (mean KL divergence, nats): RIGHT times what random errors of the size that its types lose cost the
# source. KL_LEAST is nothing: half a percent of what Q8_0 costs.
RIGHT = 3.0
KL_LEAST = 1e-5

SYSTEM = "You are a careful assistant. Answer in one sentence."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]  # fmt: skip
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one turn": [{"role": "user", "content": "What is 2+2?"}],
    "a system message": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Größe? 日本 🙂 12345"}],
    "several turns": [
        {"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And the next?\n"},
    ],
}  # fmt: skip


@dataclass(frozen=True)
class CertificateCheck:
    """One row of a certificate.

    Attributes:
        id: ``file``, ``layers``, ``tensors``, ``prompts``, ``text``, ``long context``, or ``modelfile`` where there is one.
        passed: None where nothing can be said.
        code: of what was found; stable.
        parameters: its figures.
    """

    id: str
    passed: bool | None
    code: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def figure(self) -> str:
        """What was found, in words."""
        return words(self.code, self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = plain({n: getattr(self, n) for n in ("id", "passed", "code", "figure", "parameters")})
        return found


@dataclass(repr=False)
class Certificate:
    """What `verify` says.

    Attributes:
        source, model: paths as given.
        checks: in the order in which they were made.
        peeled: what differs between the files, and the proof.
        tensors: rows by change of type: ``before, after, tensors, rel_l2`` (of the worst tensor), ``worst_row``, ``bound``.
        by_layer: layer of the model -> largest relative l2 error of a tensor in it.
        seconds: in all.
    """

    source: str
    model: str
    checks: list[CertificateCheck]
    peeled: Verdict
    tensors: list[dict[str, Any]] = field(default_factory=list)
    by_layer: dict[str, float] = field(default_factory=dict)
    engine: str | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> Word:
        """Certified only where every check was made and passed."""
        if any(check.passed is False for check in self.checks):
            return "not certified"
        return "not enough evidence" if any(check.passed is None for check in self.checks) else "certified"

    @property
    def exit_code(self) -> int:
        """0 certified, 3 not certified, 4 not enough evidence."""
        return EXIT[self.verdict]

    @property
    def sentence(self) -> str:
        """The verdict for a person who has to decide about a release."""
        bad = [check.id for check in self.checks if check.passed is False]
        open_ = [check.id for check in self.checks if check.passed is None]
        if bad:
            return f"Do not release it: {some(bad)} {'does' if len(bad) == 1 else 'do'} not hold."
        if open_:
            return f"Nothing was found, and not everything could be looked at: {some(open_)}."
        return "It is what a right conversion makes of its source, within what its types can hold."

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Of each check: id, sign, what must hold, what was found."""
        return [(c.id, SIGNS[c.passed], TITLES[c.id], c.figure) for c in self.checks]

    def __str__(self) -> str:
        lines = [f"{id:<13} {sign:<5} {found}" for id, sign, _, found in self.rows()]
        return "\n".join([f"{self.model} against {self.source}: {self.verdict}", *lines, self.sentence])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        tones = {True: "good", False: "bad", None: "open"}
        rows = [[id, Cell(sign, tones[c.passed]), *rest] for c, (id, sign, *rest) in zip(self.checks, self.rows(), strict=True)]
        caption = Cell(f"{self.verdict}: {self.sentence}", {0: "good", 3: "bad"}.get(self.exit_code, "open"))
        return table(("check", "", "what must hold", "found"), rows, caption=caption)

    def to_json(self) -> dict[str, Any]:
        """The documented schema."""
        return {
            "schema": SCHEMA, "writer": f"aprlab {__version__}", "verdict": self.verdict, "sentence": self.sentence,
            "source": self.source, "model": self.model, "engine": self.engine,
            "checks": [check.to_json() for check in self.checks], "tensors": plain(self.tensors),
            "by_layer": plain(self.by_layer), "peel": self.peeled.to_json(), "seconds": round(self.seconds, 2),
        }  # fmt: skip


def verify(
    source: str | Path,
    model: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    tokens: int | None = None,
    modelfile: str | Path | None = None,
    scheduler: str | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Certificate:
    """Compare a converted model with its source, and certify it or not.

    Args:
        source: what it was converted from: GGUF, APR, SafeTensors or a Hugging Face directory.
        model: the converted file.
        engine, threads: for both; None takes the compiled engine for real models.
        tokens: how much of the shipped text both read, at most; None: as much as the size of the model allows.
        scheduler: address of a Dask scheduler (``tcp://host:8786``) whose workers look at every scale and read the text, each a
            share; they need both files under the same paths. The layers are compared here, and the result is the same.
        modelfile: Ollama's, for the converted file: its template, stop lines and weights are checked as well.
        progress: called with the name of each check before it is made.

    Raises:
        UsageError, FormatError, UnsupportedError: the source cannot be read. A broken model is a verdict, not an error.
    """
    if scheduler is None:
        return _verified(source, model, engine, threads, tokens, modelfile, progress, None)
    with cluster.connect(scheduler, [source, model]) as workers:
        return _verified(source, model, engine, threads, tokens, modelfile, progress, workers)


def _verified(
    source: str | Path, model: str | Path, engine: str | None, threads: int | None, tokens: int | None,
    modelfile: str | Path | None, progress: Callable[[str], None], workers: cluster.Cluster | None,
) -> Certificate:  # fmt: skip
    started = time.perf_counter()
    progress("layers")
    peeled, case, _ = examine(source, model, engine=engine, threads=threads)
    checks = [_of_peel(peeled)]
    found = Certificate(str(source), str(model), checks, peeled)
    progress("file")
    checks.insert(0, _of_file(model, workers))
    if case is not None:
        found.tensors, found.by_layer = tensor_rows(case), by_layer(case)
        checks.append(_of_tensors(case, found.tensors))
    else:
        checks.append(CertificateCheck("tensors", None, "verify.not-reached"))
    if case is not None and case.file.unrun is None and checks[0].passed is True:
        checks += _of_runs(case, source, model, found, engine, threads, tokens, progress, workers)
    else:
        why = case.file.unrun.message if case is not None and case.file.unrun is not None else "the file is refused"
        checks += [CertificateCheck(id, None, "verify.needs-a-run", {"message": why}) for id in RUNS]
    if modelfile is not None:
        progress("modelfile")
        checks.append(_of_modelfile(source, Path(model), Path(modelfile)))
    found.seconds = time.perf_counter() - started
    return found


# ── the files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _of_file(path: str | Path, workers: cluster.Cluster | None) -> CertificateCheck:
    """Whether the strict reader takes the file, every scale included."""
    try:
        with open_model(path) as model:
            if workers is None:
                model.check_values()
            else:
                _check_values_by(workers, model)
            return CertificateCheck("file", True, "verify.file-sound", {"tensors": len(model.tensors), "bytes": model.nbytes})
    except AprlabError as error:
        return CertificateCheck("file", False, "verify.file-refused", {"rule": error.code, "message": error.message})


def _check_values_by(workers: cluster.Cluster, model: Model) -> None:
    """`Model.check_values` by the workers of a cluster: the first error in the file's order is raised."""
    parts = shares([cluster.path_on_all(model.path)], model.tensors.values(), workers.workers)
    found = {name: error for part in workers.map(values_share, parts) for name, error in part.items()}
    first = next((found[name] for name in model.tensors if name in found), None)
    if first is not None:
        raise first


def values_share(share: Share) -> dict[str, AprlabError]:
    """What a worker does of the check of scales: name of a tensor -> the error that it has."""
    (model,) = share.models()
    found = {}
    for name in share.names:
        try:
            model.tensors[name].check_values()
        except AprlabError as error:
            found[name] = error
    return found


def _of_peel(verdict: Verdict) -> CertificateCheck:
    """What the layers of the onion and the golden rule say."""
    bad = [f for f in verdict.findings if not f.harmless]
    listed = [{"label": f.label, "words": str(f.cause)} for f in bad[:8]]
    parameters = {"verdict": verdict.verdict, "findings": listed, "more": max(len(bad) - 8, 0)}
    if verdict.verdict in ("same", "equivalent"):
        harmless = [{"label": f.label, "words": str(f.cause)} for f in verdict.findings[:8]]
        return CertificateCheck("layers", True, "verify.layers-hold", {"verdict": verdict.verdict, "harmless": harmless})
    return CertificateCheck("layers", False, "verify.layers-differ", parameters)


def _of_modelfile(source: str | Path, model: Path, path: Path) -> CertificateCheck:
    """The prompts that Ollama makes are those of the source's template, and its answers end where the source's do."""
    try:
        with open_model(source) as a:
            problems, whole = modelfile_problems(a, path, model, CONVERSATIONS)
    except BROKEN as error:
        return CertificateCheck("modelfile", False, "verify.modelfile-refused", {"message": reason(error)})
    if problems:
        return CertificateCheck("modelfile", False, "verify.modelfile-differs", {"problems": problems})
    if not whole:
        return CertificateCheck("modelfile", None, "verify.modelfile-without-template")
    return CertificateCheck("modelfile", True, "verify.modelfile-same", {"prompts": len(CONVERSATIONS)})


def tensor_rows(case: FileCase) -> list[dict[str, Any]]:
    """One row for each change of type, and one for the tensors that are their source's to the bit."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    lost = {d.match.piece.at: d.evidence for d in case.deviations if d.kind == "encoding" and d.match is not None}
    for match in case.matches:
        if match.of is None:
            continue
        kind = match.kind.name if match.kind is not None else "unknown"
        fresh = {"before": match.of.type.name, "after": kind, "tensors": 0, "equal": 0, "rel_l2": 0.0, "worst_row": 0.0}
        row = rows.setdefault((match.of.type.name, kind), {**fresh, "bound": None})
        evidence = lost.get(match.piece.at, {})
        row["tensors"] += 1
        row["equal"] += match.equal
        row["rel_l2"] = max(row["rel_l2"], float(evidence.get("rel_l2", 0.0)))
        row["worst_row"] = max(row["worst_row"], float(evidence.get("worst_row_rel_l2", 0.0)))
        row["bound"] = evidence.get("bound_of_a_row", row["bound"])
    return sorted(rows.values(), key=lambda row: -row["tensors"])


def by_layer(case: FileCase) -> dict[str, float]:
    """Largest relative l2 error of a tensor in each layer of the model, as far as tensors are held in other types."""
    found: dict[str, float] = {}
    for d in case.deviations:
        if d.kind == "encoding" and d.tensor.startswith("blk."):
            layer = ".".join(d.tensor.split(".")[:2])
            found[layer] = max(found.get(layer, 0.0), float(d.evidence.get("rel_l2", 0.0)))
    return found


def _of_tensors(case: FileCase, rows: Sequence[dict[str, Any]]) -> CertificateCheck:
    """Each tensor is its source's, or within what its type can hold; outliers by name."""
    outliers = [d for d in case.deviations if not d.harmless and d.match is not None]
    missing = [d.tensor for d in case.deviations if d.kind == "missing"]
    total = sum(row["tensors"] for row in rows)
    if outliers or missing or not total:
        first = list(dict.fromkeys([*(d.tensor for d in outliers), *missing]))
        return CertificateCheck("tensors", False, "verify.tensors-off", {"off": len(first), "of": total, "first": first[:8]})
    equal, worst = sum(row["equal"] for row in rows), max(row["worst_row"] for row in rows)
    return CertificateCheck("tensors", True, "verify.tensors-hold", {"tensors": total, "equal": equal, "worst_row": worst})


# ── the runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _of_runs(
    case: FileCase, source: str | Path, path: str | Path, found: Certificate, engine: str | None, threads: int | None,
    tokens: int | None, progress: Callable[[str], None], workers: cluster.Cluster | None,
) -> list[CertificateCheck]:  # fmt: skip
    """The checks for which both sides are loaded."""
    exact = all(row["equal"] == row["tensors"] for row in found.tensors)
    with open_model(source) as a, open_model(path) as b:
        found.engine = choose(engine, a, threads=threads).spec
        progress("prompts")
        reference = _source_session(case, a, found, threads)
        try:
            candidate = session_beside(reference, b, engine=found.engine, threads=threads)
            checks = [_of_prompts(reference, candidate)]
            progress("text")
            checks += _of_text(reference, candidate, tokens, None if exact else losses(case), far=_far(workers, found))
        except BROKEN as error:
            message = {"message": reason(error)}
            return [CertificateCheck(id, False, "verify.run-refused", message) for id in RUNS]
    return checks


def _source_session(case: FileCase, source: Model, found: Certificate, threads: int | None) -> Session:
    """A session over the source as it was opened, with the weights that `peel` has laid out if it ran it on this engine."""
    assert found.engine is not None
    if case.ref is None or found.peeled.engine != found.engine:
        return Session(source, engine=found.engine, threads=threads)
    lender = golden_of(case.ref, found.engine, threads, QUESTION, MAX_TOKENS).session
    return session_beside(lender, source, engine=found.engine, threads=threads)


def _far(workers: cluster.Cluster | None, found: Certificate) -> Callable[[Sequence[Sequence[int]]], Reading] | None:
    """What lets workers read windows; None where there are none."""
    if workers is None or found.engine is None:
        return None
    share = Share((cluster.path_on_all(found.source), cluster.path_on_all(found.model)), ())
    return partial(read_by, workers, share, found.engine)


def _of_prompts(a: Session, b: Session) -> CertificateCheck:
    """Prompt ids of several conversations, and what ends an answer."""
    other = [name for name, (x, y) in _prompts(a, b).items() if x != y]
    if a.tokenizer.eog != b.tokenizer.eog:
        other.append("the tokens that end an answer")
    asked = len(_prompts(a, b))
    if other:
        return CertificateCheck("prompts", False, "verify.prompts-differ", {"first": other, "of": asked})
    return CertificateCheck("prompts", True, "verify.prompts-same", {"prompts": asked, "ends": sorted(a.tokenizer.eog)})


def _prompts(a: Session, b: Session) -> dict[str, tuple[Any, Any]]:
    """What each side makes of a conversation: ids, or the code of the error with which it is refused."""
    found: dict[str, tuple[Any, Any]] = {}
    text = certificate_text()[:400]
    found["a text"] = a.tokenizer.encode(text), b.tokenizer.encode(text)
    for name, turns in CONVERSATIONS.items():
        found[name] = _asked(a, turns), _asked(b, turns)
    found["tools"] = _asked(a, CONVERSATIONS["one turn"], TOOLS), _asked(b, CONVERSATIONS["one turn"], TOOLS)
    return found


def _asked(session: Session, turns: list[dict[str, str]], tools: list[dict[str, Any]] | None = None) -> Any:
    template = session.model.tokenizer.chat_template
    try:
        if tools is None or template is None:
            return session.chat_tokens(turns)
        return session.tokenizer.encode(render(template, turns, tools=tools))
    except AprlabError as error:
        return error.code


def _of_text(
    a: Session, b: Session, tokens: int | None, errors: Mapping[str, RowErrors] | None,
    far: Callable[[Sequence[Sequence[int]]], Reading] | None = None,
) -> list[CertificateCheck]:  # fmt: skip
    """KL divergence and agreement over the text in windows, and over the last quarter of one long window.

    Args:
        a, b: source and candidate.
        tokens: of the text, at most; None: as many as the size of the model allows.
        errors: what each tensor has lost, row by row; None: all are the source's to the bit, and then all logits are.
        far: reads windows somewhere else.
    """
    near, long = affordable(a, tokens)
    texts = {"text": windows(a, near), "long context": [long_window(a, long)]}
    if any(max(ids) >= b.config.vocab_size for parts in texts.values() for ids in parts):  # rows that only pad may differ
        sizes = {"expected": a.config.vocab_size, "found": b.config.vocab_size}
        return [CertificateCheck(id, False, "verify.vocabulary-differs", sizes) for id in texts]
    of = len(a.tokenizer.encode(certificate_text(), parse_special=False))
    exact = errors is None
    expected = None if errors is None else foretold(a, errors, texts["text"][0])
    checks = []
    for id, parts in texts.items():
        part = slice(None) if id == "text" else slice(len(parts[0]) * 3 // 4, None)
        reading = read(a, b, parts) if far is None else far(parts)
        kl, low, high = interval(reading.kl[:, part])
        same, same_low, same_high = interval(reading.same[:, part])
        allowed = 0.0 if exact else None if expected is None else RIGHT * expected + KL_LEAST
        figures = {
            "tokens": int(reading.kl[:, part].size), "of": of, "kl": kl, "kl_interval": [max(low, 0.0), high], "allowed": allowed,
            "same": same, "same_interval": [max(same_low, 0.0), min(same_high, 1.0)], "from_position": part.start or 0,
            "exact": exact,
        }  # fmt: skip
        passed = None if allowed is None else kl <= allowed and (not exact or same == 1.0)
        code = "same" if kl == 0 else "unbounded" if passed is None else "near" if passed else "off"
        checks.append(CertificateCheck(id, passed, f"verify.text-{code}", figures))
    return checks


__all__ = ["Certificate", "CertificateCheck", "verify"]
