"""Runs a playbook: scenarios in child processes, each with a time limit; finished rows are kept and not run again.

A child serves many scenarios and is started again when it has crashed, hung or run out of memory: each of those is a
result of the scenario it happened in, and of no other.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from aprlab.engines import AUTO, Choice, choose
from aprlab.errors import FormatError, UsageError
from aprlab.formats import open_model
from aprlab.formats.leftovers import claim, claimed_folder, release_folder, sweep_temporary
from aprlab.formats.reading import read_bytes
from aprlab.formats.writing import write_text
from aprlab.qualification import scoring, worker
from aprlab.qualification.oracles import Answer
from aprlab.qualification.playbook import FORMATS, Playbook, Scenario
from aprlab.qualification.scoring import CRASH, ERROR, FAIL, MEMORY, PASS, SKIP, TIMEOUT, ScenarioRow
from aprlab.version import __version__

START = 300.0  # seconds for a child to open a model
JUDGE_SECONDS, JUDGE_MEMORY = 30.0, 4 << 30  # of an oracle; bytes of address space, of which NumPy alone reserves one GB
FILE_LIMIT = 64 << 20  # bytes of a qualification
_OTHERS = ("What colour is the sky?", "Name a fruit.")  # asked between repetitions, so that the cache is another's


class Broken(Exception):
    """A child ended, hung, or refused; `outcome` says which."""

    def __init__(self, outcome: str, note: str, kind: str = "") -> None:
        super().__init__(note)
        self.outcome, self.note, self.kind = outcome, note, kind


class Child:
    """A process that serves requests; started when first needed."""

    def __init__(self, serve: worker.Serve, memory: int | None, start: dict[str, Any] | None = None) -> None:
        self._serve, self._memory, self._start = serve, memory, start
        self._process: Any = None
        self._link: Any = None
        self._log, self._errors = -1, ""  # what the child prints: descriptor and path
        self._failed: Broken | None = None  # a child that cannot even start is not tried again

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The reply to a request, with its `seconds` and `cpu`; a child that is not there is started.

        Raises:
            Broken: it crashed, took longer than `timeout` seconds, ran out of memory, or raised an error.
        """
        if self._failed is not None:
            raise self._failed
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._link, far = context.Pipe()
            sweep_temporary("aprlab-child-")
            self._log, self._errors = tempfile.mkstemp(prefix="aprlab-child-", suffix=".log")
            claim(self._log)
            self._process = context.Process(target=self._serve, args=(far, self._errors, self._memory), daemon=True)
            self._process.start()
            far.close()
            if self._start is not None:
                try:
                    self._send(dict(self._start), max(timeout, START))
                except Broken as error:
                    self.close()
                    self._failed = error
                    raise
        return self._send(request, timeout)

    def _send(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        try:
            self._link.send(request)
            if not self._link.poll(timeout):
                self.close()
                raise Broken(TIMEOUT, f"no answer within {timeout:g} s")
            reply: dict[str, Any] = self._link.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            code = self._process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
            last = self._last_line()
            self.close()
            outcome = MEMORY if code == -signal.SIGKILL else CRASH  # the kernel kills so when memory is short
            raise Broken(outcome, f"the process ended: {how}" + (f"; {last}" if last else "")) from None
        if "error" in reply:
            if reply["kind"] == "memory":
                self.close()
                raise Broken(MEMORY, reply["error"])
            raise Broken(ERROR, reply["error"], reply["kind"])
        return reply["ok"] | {"seconds": reply["seconds"], "cpu": reply["cpu"]}

    def _last_line(self) -> str:
        lines = Path(self._errors).read_text(errors="replace").split("\n") if self._errors else []
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._link.close()
            self._process = None
        if self._errors:
            Path(self._errors).unlink(missing_ok=True)
            os.close(self._log)
            self._errors = ""


@dataclass
class Qualification:
    """The rows of one model under one playbook, with both scores.

    Attributes:
        model: file name, format, bytes, inventory by type.
        playbook: name, title, digest.
        engine, threads, formats: how it was run.
        engine_asked: the engine that was asked for: ``auto``, or `engine` itself.
        rows: in the order of the playbook, format by format.
        resumed: how many of them were kept from an earlier run.
    """

    model: dict[str, Any]
    playbook: dict[str, Any]
    engine: str
    threads: int | None
    formats: tuple[str, ...]
    rows: list[ScenarioRow]
    resumed: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    engine_asked: str = ""

    @property
    def own(self) -> scoring.OwnScore:
        """This project's score."""
        return scoring.own_score(self.rows)

    @property
    def upstream(self) -> scoring.UpstreamScore:
        """Upstream's score of the same rows."""
        return scoring.upstream_score(self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it again."""
        return {
            "model": self.model, "playbook": self.playbook, "engine": self.engine,
            "engine_asked": self.engine_asked or self.engine, "threads": self.threads,
            "formats": list(self.formats), "environment": self.environment,
            "own": self.own.to_json() | {"sentence": self.own.sentence}, "upstream": self.upstream.to_json(),
            "rows": [row.to_json() for row in self.rows],
        }  # fmt: skip

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Qualification:
        """What `to_json` gave; the scores are computed again."""
        return Qualification(
            data["model"], data["playbook"], data["engine"], data["threads"], tuple(data["formats"]),
            [ScenarioRow(**row) for row in data["rows"]], environment=data.get("environment", {}),
            engine_asked=data.get("engine_asked", ""),
        )  # fmt: skip


def qualify(
    model: str | Path,
    playbook: Playbook,
    *,
    formats: Sequence[str] | None = None,
    engine: str | None = "auto",
    threads: int | None = None,
    journal: str | Path | None = None,
    memory: int | None = None,
    minutes: float | None = None,
    on_row: Callable[[ScenarioRow], None] = lambda row: None,
    serve: worker.Serve = worker.serve,
) -> Qualification:
    """Put a model through a playbook.

    Args:
        model: a GGUF or APR file, or a folder with SafeTensors.
        playbook: see `aprlab.qualification.playbook.load`.
        formats: which to test; the playbook's own without it. What the model is not is made from it, in a temporary folder.
        engine, threads: for every child; ``auto``: the playbook's own, or, where it has none, as the rule has it for
            `model`, the same for all.
        journal: a file that keeps finished rows; a run with the same model, playbook and engine goes on from there, with
            other formats too.
        memory: most bytes of address space of a child.
        minutes: when they are over, nothing new is begun; what was not reached is not run, and the next run's.
        on_row: called with each finished row, kept ones too.
        serve: what the children run; for tests.

    Raises:
        UsageError: no such model, or an unknown format.
        FormatError, UnsupportedError: the model itself cannot be opened, or the journal is none.
    """
    facts, choice = _facts(model, playbook.engine if engine in (None, "", AUTO) else engine, threads)
    chosen = _known_formats(formats or playbook.formats)
    run = _Run(Path(model).resolve(), facts["format"], playbook, chosen, choice.spec, threads, memory, serve)
    programs = {"aprlab": __version__, "peer": _peer_version()}
    try:
        kept = _Journal(journal, {**run.header, **programs})
        rows, resumed = _rows(run, kept, None if minutes is None else time.monotonic() + 60 * minutes, on_row)
    finally:
        run.close()
    described = {"name": playbook.name, "title": playbook.title, "digest": playbook.digest}
    return Qualification(facts, described, choice.spec, threads, chosen, rows, resumed, programs, choice.asked)


def _facts(model: str | Path, engine: str | None, threads: int | None) -> tuple[dict[str, Any], Choice]:
    """File name, format, bytes and numbers of the model, which has to open; and the engine that runs it."""
    with open_model(model) as opened:
        choice = choose(engine, opened, threads=threads)
        return {
            "file": Path(model).name, "format": opened.format, "bytes": opened.nbytes, "by_type": opened.by_type(),
            "parameters": sum(t.size for t in opened.tensors.values()),
        }, choice  # fmt: skip


def _known_formats(wanted: Sequence[str]) -> tuple[str, ...]:
    for name in wanted:
        if name not in FORMATS:
            raise UsageError(f"unknown format {name!r}; known: {', '.join(FORMATS)}", code="qualification.format-unknown")
    return tuple(wanted)


def _rows(
    run: _Run, kept: _Journal, deadline: float | None, on_row: Callable[[ScenarioRow], None]
) -> tuple[list[ScenarioRow], int]:  # fmt: skip
    """Every row of the plan, and how many of them are an earlier run's; past the deadline nothing is begun."""
    rows: list[ScenarioRow] = []
    resumed = 0
    for scenario, format in run.plan():
        key = f"{scenario.id}@{format}"
        row = kept.rows.get(key)
        if row is None:
            late = deadline is not None and time.monotonic() > deadline
            row = run.row(scenario, format, scoring.LATE) if late else run.do(scenario, format)
            kept.add(key, row)
        else:
            resumed += 1
        rows.append(row)
        on_row(row)
    return rows, resumed


def count(playbook: Playbook, formats: Sequence[str]) -> int:
    """How many rows a run will have."""
    return sum(1 for _ in _plan(playbook, formats))


def _plan(playbook: Playbook, formats: Sequence[str]) -> Iterator[tuple[Scenario, str]]:
    """Conversions and gates first: they decide most, and cost least."""
    for scenario in playbook.scenarios:
        if scenario.kind == "convert":
            yield scenario, f"{scenario.source}→{scenario.target}"
        if scenario.kind == "gate":
            yield scenario, "gguf→apr"
    for format in formats:
        for scenario in playbook.scenarios:
            if not scenario.once:
                yield scenario, format


def _peer_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return None


class _Journal:
    """Finished rows, a line each; the first line says what they are rows of. A torn last line is not read."""

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        self.rows: dict[str, ScenarioRow] = {}
        if self.path is None:
            return
        first = json.dumps({"journal": header}, sort_keys=True)
        found = self.path.read_bytes() if self.path.is_file() else b""
        whole = found[: found.rfind(b"\n") + 1].decode("utf-8", "replace")
        lines = whole.split("\n")[:-1]  # answers may hold what `splitlines` takes for other ends of a line
        if lines and lines[0] == first:
            for n, line in enumerate(lines[1:], 2):
                try:
                    entry = json.loads(line)
                    self.rows[entry["key"]] = ScenarioRow(**entry["row"])
                except (ValueError, KeyError, TypeError):
                    said = f"not a journal: line {n} holds no row; --fresh starts again"
                    raise FormatError(said, code="qualification.journal", path=self.path) from None
        else:
            whole = first + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if whole.encode() != found:
            write_text(self.path, whole)

    def add(self, key: str, row: ScenarioRow) -> None:
        """Keep a row, on disk before the next one begins. What was not run, or met an error, is tried again next time."""
        if self.path is None or row.outcome in (SKIP, ERROR):
            return
        with open(self.path, "a", encoding="utf-8") as file:
            entry = finite({"key": key, "row": row.to_json()})
            file.write(json.dumps(entry, ensure_ascii=True, allow_nan=False) + "\n")  # ASCII: half a character cannot be written
            file.flush()
            os.fsync(file.fileno())


def finite(value: Any) -> Any:
    """Plain data without NaN and infinities, which JSON cannot express: None replaces them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


class _Run:
    """The children and files of one run."""

    def __init__(
        self, model: Path, format: str, playbook: Playbook, formats: Sequence[str], engine: str, threads: int | None,
        memory: int | None, serve: worker.Serve,
    ) -> None:  # fmt: skip
        self.playbook, self.formats, self.engine, self.threads = playbook, formats, engine, threads
        self.memory, self.serve = memory, serve
        self.files: dict[str, Path | Broken] = {format: model}
        self.source = format
        sweep_temporary("aprlab-qualify-")
        self.folder = claimed_folder("aprlab-qualify-")
        self._format = ""
        self._child: Child | None = None
        self._peer: Child | None = None
        self._judge: Child | None = None
        self._peers: dict[str, dict[str, Any]] = {}
        self._words: dict[str, dict[str, Any]] | Broken | None = None
        stats = [file.stat() for file in (model.iterdir() if model.is_dir() else [model]) if file.is_file()]
        self.header = {
            "model": model.name, "bytes": sum(s.st_size for s in stats), "modified": max(s.st_mtime_ns for s in stats),
            "playbook": playbook.digest, "engine": engine, "threads": threads, "memory": memory,
        }  # fmt: skip

    def close(self) -> None:
        for child in (self._child, self._peer, self._judge):
            if child is not None:
                child.close()
        release_folder(self.folder)

    def plan(self) -> Iterator[tuple[Scenario, str]]:
        return _plan(self.playbook, self.formats)

    @staticmethod
    def row(scenario: Scenario, format: str, note: str = "") -> ScenarioRow:
        """A row that was not run."""
        return ScenarioRow(scenario.id, scenario.area, scenario.kind, format, SKIP, prompt=scenario.words, note=note)

    def do(self, scenario: Scenario, format: str) -> ScenarioRow:
        """One row."""
        row = self.row(scenario, format)
        try:
            if scenario.kind == "convert":
                self._convert(scenario, row)
            elif scenario.kind == "gate":
                self._gate(scenario, row)
            else:
                self._answer(scenario, format, row)
        except Broken as error:
            row.outcome, row.note = error.outcome, error.note
        return row

    # -- files ---------------------------------------------------------------------------------------------------

    def file(self, format: str) -> Path:
        """The model in this format, made when first asked for; raises Broken where it cannot be made."""
        if format not in self.files:
            try:
                self.files[format] = self._made(self.file(self.source), format, f"model.{format}")
            except Broken as error:
                self.files[format] = error
        found = self.files[format]
        if isinstance(found, Broken):
            raise Broken(found.outcome, f"no {format} file: {found.note}", found.kind)
        return found

    def _made(self, source: Path, format: str, name: str, timeout: float = 1800.0) -> Path:
        path = self.folder / name
        child = Child(self.serve, self.memory)
        try:
            child.ask({"op": "convert", "source": str(source), "output": str(path), "format": format}, timeout)
        finally:
            child.close()
        return path

    def _child_of(self, format: str) -> Child:
        if self._child is None or self._format != format:
            if self._child is not None:
                self._child.close()
            start = {"op": "open", "path": str(self.file(format)), "engine": self.engine, "threads": self.threads}
            self._child, self._format = Child(self.serve, self.memory, start), format
        return self._child

    # -- answers -------------------------------------------------------------------------------------------------

    def _answer(self, scenario: Scenario, format: str, row: ScenarioRow) -> None:
        child = self._child_of(format)
        answer = Answer()
        try:
            if scenario.asks:
                reply = self._once(child, scenario, scenario.question)
            else:
                reply = child.ask({"op": scenario.kind}, scenario.timeout)
        except Broken as error:
            if error.outcome != ERROR or error.kind == "bug":
                raise
            answer.refused = error.note
            if not any(name == "refused" for name, _ in scenario.expect):
                raise
            reply = {}
        for name in ("text", "tokens", "stop", "prompt_tokens", "ends", "figures"):
            setattr(answer, name, reply.get(name, getattr(answer, name)))
        row.text, row.stop, row.tokens, row.figures = answer.text, answer.stop, answer.tokens, answer.figures
        row.seconds, row.cpu = reply.get("seconds", 0.0), reply.get("cpu", 0.0)
        words = []
        if scenario.repeat > 1 or scenario.restart:
            words += self._again(child, scenario, answer, row)
        if any(name == "agreement" for name, _ in scenario.expect):
            answer.peer = self._asked_peer(answer.prompt_tokens, scenario.max_tokens)
        words += [self._word(name, answer, argument, scenario.prompt) for name, argument in scenario.expect]
        row.words = words
        said = [word["passed"] for word in words]
        if any(passed is False for passed in said):
            row.outcome = FAIL
        elif said and all(passed is None for passed in said):
            row.outcome, row.note = SKIP, "; ".join(word["said"] for word in words)
        else:
            row.outcome = PASS

    def _word(self, name: str, answer: Answer, argument: Any, prompt: Any) -> dict[str, Any]:
        """An oracle's word, from a process with limits on time and memory: an answer may be made to exhaust it.

        An answer that an oracle cannot finish does not pass it; an oracle that fails by a fault of its own is an error.
        """
        if self._judge is None:
            self._judge = Child(worker.serve, JUDGE_MEMORY)
        try:
            request = {"op": "judge", "name": name, "answer": asdict(answer), "argument": argument, "prompt": prompt}
            word: dict[str, Any] = self._judge.ask(request, JUDGE_SECONDS)["word"]
        except Broken as error:
            if error.outcome == ERROR:
                raise Broken(ERROR, f"oracle {name}: {error.note}", error.kind) from None
            return {"oracle": name, "passed": False, "said": f"cannot be judged: {error.outcome}, {error.note}"}
        return word

    def _once(self, child: Child, scenario: Scenario, prompt: Any) -> dict[str, Any]:
        return child.ask(
            {"op": "ask", "kind": scenario.kind, "prompt": prompt, "system": scenario.system,
             "max_tokens": scenario.max_tokens, "temperature": scenario.temperature, "seed": scenario.seed,
             "stop": list(scenario.stop)},
            scenario.timeout,
        )  # fmt: skip

    def _again(self, child: Child, scenario: Scenario, answer: Answer, row: ScenarioRow) -> list[dict[str, Any]]:
        """The same question again, after others and in a fresh process."""
        words = []
        for name, times in (("repeat", scenario.repeat - 1), ("restart", int(scenario.restart))):
            same = 0
            for n in range(times):
                if name == "restart":
                    child.close()
                else:
                    self._once(child, replace(scenario, kind="ask", max_tokens=2, fill=("", 0)), _OTHERS[n % len(_OTHERS)])
                reply = self._once(child, scenario, scenario.question)
                same += (reply["tokens"], reply["text"]) == (answer.tokens, answer.text)
                row.seconds, row.cpu = row.seconds + reply["seconds"], row.cpu + reply["cpu"]
            if times:
                words.append({"oracle": name, "passed": same == times, "said": f"{same} of {times} times the same tokens"})
        return words

    def _asked_peer(self, prompt: list[int], max_tokens: int) -> dict[str, Any] | None:
        """llama.cpp's answer to these ids, from the GGUF file; None where there is no llama.cpp or no such file."""
        if _peer_version() is None or not prompt:
            return None
        key = json.dumps([prompt, max_tokens])
        if key not in self._peers:
            try:
                if self._peer is None:
                    self._peer = Child(self.serve, self.memory)
                request = {"op": "peer", "path": str(self.file("gguf")), "prompt": prompt, "max_tokens": max_tokens}
                self._peers[key] = self._peer.ask(request, START)
            except Broken as error:
                self._peers[key] = {"error": f"{error.outcome}: {error.note}"}
        return self._peers[key]

    # -- conversions and gates -----------------------------------------------------------------------------------

    def _convert(self, scenario: Scenario, row: ScenarioRow) -> None:
        if not {scenario.source, scenario.target} <= set(self.formats):
            row.note = f"{' and '.join(sorted({scenario.source, scenario.target} - set(self.formats)))} is not asked for"
            return
        source = self.file(scenario.source)
        made: Path | None = None
        child = Child(self.serve, self.memory)
        try:
            if scenario.source == self.source:
                target = self.file(scenario.target)
            else:
                target = made = self._made(source, scenario.target, f"{scenario.source}-to.{scenario.target}", scenario.timeout)
            reply = child.ask(
                {"op": "pair", "source": str(source), "output": str(target), "engine": self.engine, "threads": self.threads,
                 "prompts": list(self.playbook.golden), "max_tokens": scenario.max_tokens},
                scenario.timeout,
            )  # fmt: skip
        finally:
            child.close()
            if made is not None:
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
        pair = reply["pair"]
        row.details, row.seconds, row.cpu = pair, reply["seconds"], reply["cpu"]
        golden = [a["golden"] for a in pair["answers"]]
        tokens = sum(a["tokens"] for a in pair["answers"])
        far = max(a["relative_l2"] for a in pair["answers"])
        row.text = "\n".join(a["texts"][1] for a in pair["answers"])
        bits = "bit for bit the same" if all(a["bitwise"] for a in pair["answers"]) else f"off by {far:.2g} of their norm"
        row.words = [
            {"oracle": "golden", "passed": all(golden) and tokens > 0,
             "said": f"{sum(golden)} of {len(golden)} answers the same ({tokens} tokens), logits {bits}"},
            {"oracle": "values", "passed": pair["other"] == 0 and pair["same"] > 0,
             "said": f"{pair['same']} tensors with every value the same, {pair['other']} other"
             + (f", first {pair['first']}" if pair["first"] else "")},
        ]  # fmt: skip
        row.outcome = PASS if all(w["passed"] for w in row.words) else FAIL

    def _gate(self, scenario: Scenario, row: ScenarioRow) -> None:
        if not {"gguf", "apr"} <= set(self.formats):
            row.note = "the gates want a GGUF and an APR file"
            return
        said = self._gates(scenario.timeout)
        if scenario.gate not in said:
            raise Broken(ERROR, f"no word of {scenario.gate}")
        word = said[scenario.gate]
        row.words = [{"oracle": scenario.gate, "passed": word["passed"], "said": word["figure"]}]
        row.note = word["assertion"]
        row.outcome = SKIP if word["passed"] is None else PASS if word["passed"] else FAIL

    def _gates(self, timeout: float) -> dict[str, dict[str, Any]]:
        """All gates of the playbook at once: they share what they look at."""
        if isinstance(self._words, Broken):
            raise self._words
        if self._words is None:
            child = Child(self.serve, self.memory)
            ids = [s.gate for s in self.playbook.scenarios if s.kind == "gate"]
            ref, cand = (self.file(f) for f in (("gguf", "apr") if self.source != "apr" else ("apr", "gguf")))
            try:
                reply = child.ask(
                    {"op": "gates", "ref": str(ref), "cand": str(cand), "engine": self.engine,
                     "prompts": list(self.playbook.golden), "max_tokens": 12, "ids": ids},
                    timeout,
                )  # fmt: skip
                self._words = {word["id"]: word for word in reply["gates"]}
            except Broken as error:
                self._words = error
                raise
            finally:
                child.close()
        return self._words


def read(path: str | Path) -> Qualification:
    """A qualification as `aprlab qualify` left it; raises FormatError where the file is none."""
    try:
        return Qualification.from_json(json.loads(read_bytes(Path(path), FILE_LIMIT)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"not a qualification: {type(error).__name__} {error}"
        raise FormatError(said, code="qualification.file", path=path) from None


__all__ = ["Broken", "Child", "Qualification", "count", "qualify", "read"]
