"""A gate measures with the instruments that it names: it dies with each of them, and it calls no other."""

from __future__ import annotations

import ast
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aprlab
from aprlab import instruments
from aprlab.conversion.converter import convert
from aprlab.errors import UsageError
from aprlab.faults import convert_with, instrument_faults, session_with
from aprlab.formats import apr, open_model
from aprlab.gates import GATES, Gate
from aprlab.gates.evidence import CandidateFile, GateCase, ReferenceSide
from aprlab.gates.results import holds
from aprlab.gates.running import ask
from aprlab.inference.session import Session
from aprlab.instruments import INSTRUMENTS, InstrumentSet, Statistics
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.tracing.comparisons import Difference

Measure = Callable[..., Any]


def finds_no_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    return Difference(a.size, True, 0.0, 0.0, 1.0, None)


def same_of_everything(values: np.ndarray) -> Statistics:
    return Statistics(values.size, 0.0, 1.0, -1.0, 1.0, (0.0,) * len(instruments.PERCENTILES), 0, 0, 0, 0.0)


# Every faulty instrument: those of the catalogue, and one for each instrument that no fault of the catalogue stands in for.
FAULTY: dict[str, tuple[str, Measure]] = {
    **{id: (fault.replaces, fault.instrument) for id, fault in instrument_faults().items()},
    "finds-no-difference": ("comparison", finds_no_difference),
    "same-of-everything": ("statistics", same_of_everything),
}
# (gate, faulty instrument) -> a candidate at which the gate's word changes with it
NOTICED = {
    ("F-GOLDEN-RULE-001", "finds-no-difference"): "other answers",
    ("F-GOLDEN-RULE-002", "first-ten"): "biases missing",
    ("F-GOLDEN-RULE-003", "words-for-garbage"): "garbage",
    ("F-ROSETTA-FP-001", "order-blind-checksum"): "values in another order",
    ("F-ROSETTA-FP-001", "nothing-compared"): "biases missing",
    ("F-ROSETTA-FP-001", "common-only"): "biases missing",
    ("F-ROSETTA-STATS-001", "same-of-everything"): "doubled values",
    ("F-APR-FORMAT-001", "always-succeeds"): "cut short",
    ("F-APR-FORMAT-001", "partial-file-valid"): "cut short",
    ("I-1", "nothing-compared"): "biases missing",
    ("I-1", "common-only"): "biases missing",
    ("I-2", "nothing-compared"): "names of another format",
    ("I-2", "common-only"): "biases missing",
    ("I-3", "always-succeeds"): "NaN in a norm",
    ("I-3", "partial-file-valid"): "NaN in a norm",
    ("I-4", "order-blind-checksum"): "values in another order",
    ("I-4", "same-of-everything"): "doubled values of another type",
    ("I-5", "nothing-compared"): "no chat template",
    ("I-5", "common-only"): "no chat template",
    ("A-LOGITS", "finds-no-difference"): "other logits",
    ("A-SERIAL", "finds-no-difference"): "passes that depend on their length",
    ("A-WORK", "finds-no-difference"): "weights decoded at every pass",
}


class Candidates:
    """Candidates by what is wrong with them; each is made once."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.model, self.folder = open_model(path), folder
        self.ref = ReferenceSide(self.model, None, "reference", ["What is 2+2?"], 6, threads=1)
        self.healthy = folder / "healthy.apr"
        convert(self.model, self.healthy)
        self.made: dict[str, tuple[CandidateFile, Session | None]] = {}

    def case(self, wrong: str, tools: InstrumentSet) -> GateCase:
        if wrong not in self.made:
            self.made[wrong] = self.make(wrong)
        file, given = self.made[wrong]
        if given is not None:
            given.forget()
        return GateCase(self.ref, file, given, instruments=tools, tested=[])

    def make(self, wrong: str) -> tuple[CandidateFile, Session | None]:
        files = {"biases missing": "missing-biases", "names of another format": "raw-names"}
        runs = {
            "other answers": "gqa-modulo", "other logits": "prefill-decode", "garbage": "q4k-nibble-pairs",
            "weights decoded at every pass": "cache-key-mismatch", "passes that depend on their length": "kv-twice",
        }  # fmt: skip
        if wrong in runs:
            return CandidateFile(self.healthy), session_with(self.ref.session, [runs[wrong]])
        path = self.folder / f"{wrong}.apr"
        if wrong in files:
            convert_with(self.model, path, [files[wrong]])
        elif wrong == "cut short":
            path.write_bytes(self.healthy.read_bytes()[: int(0.955 * self.healthy.stat().st_size)])
        elif wrong == "NaN in a norm":
            path.write_bytes(with_nan(self.healthy))
        else:
            convert(self.changed(wrong), path)
        return CandidateFile(path), None

    def changed(self, wrong: str) -> Model:
        """The model with one tensor changed, or without its template."""
        name, tokenizer = "blk.1.ffn_norm.weight", self.model.tokenizer
        plain = self.model.tensors[name].dequantise()
        tensors = dict(self.model.tensors)
        if wrong == "no chat template":
            tokenizer = replace(tokenizer, chat_template=None)
        elif wrong == "values in another order":
            tensors[name] = written(tensors[name], plain[::-1])
        elif wrong == "doubled values":
            tensors[name] = written(tensors[name], 2 * plain)
        else:
            assert wrong == "doubled values of another type"
            name = "blk.1.attn_q.weight"
            tensors[name] = written(tensors[name], 2 * tensors[name].dequantise())
        return Model(
            path=self.model.path, format="apr", dialect="aprender", tensors=tensors, metadata={},
            make_config=lambda: self.model.config, make_tokenizer=lambda: tokenizer,
        )  # fmt: skip


def written(tensor: Tensor, values: np.ndarray) -> Tensor:
    raw = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
    return Tensor(tensor.name, types.F32, tensor.shape, raw, replace(tensor.origin, offset=-1))


def with_nan(path: Path) -> bytes:
    """The file with a NaN among a norm's weights, and checksums that say that this is right."""
    content, box = bytearray(path.read_bytes()), apr.scan(path)
    (entry,) = [e for e in box.entries if e.name == "model.norm.weight"]
    at = box.data_offset + entry.offset
    content[at : at + 4] = np.float32(np.nan).tobytes()
    return bytes(content[:-4]) + zlib.crc32(content[:-4]).to_bytes(4, "little")


@pytest.fixture(scope="module")
def candidates(tiny, tmp_path_factory) -> Candidates:
    return Candidates(tiny, tmp_path_factory.mktemp("candidates"))


def word(gate: Gate, candidates: Candidates, wrong: str, faulty: str | None) -> tuple[bool | None, bool]:
    """What a gate says with one instrument replaced, or with none; nothing is void here."""
    replaced = {} if faulty is None else dict([FAULTY[faulty]])
    said = ask(gate, candidates.case(wrong, InstrumentSet(replaced)))
    return said.passed, said.refused


def test_every_faulty_instrument_of_this_file_fails_the_self_test() -> None:
    for name, measure in FAULTY.values():
        assert not instruments.show(INSTRUMENTS[name], measure).ok


def test_a_candidate_is_known_for_every_gate_and_every_faulty_one_of_its_instruments() -> None:
    expected = {(g.id, id) for g in GATES.values() for id, (name, _) in FAULTY.items() if name in g.rests_on}
    assert set(NOTICED) == expected
    assert {name for g in GATES.values() for name in g.rests_on} <= {name for name, _ in FAULTY.values()}


@pytest.mark.parametrize(("gate", "faulty"), list(NOTICED))
def test_a_gate_dies_with_its_instrument(candidates, gate, faulty) -> None:
    wrong = NOTICED[gate, faulty]
    assert word(GATES[gate], candidates, wrong, None) == (False, False), "the honest instrument finds what is wrong"
    assert word(GATES[gate], candidates, wrong, faulty) != (False, False), "the faulty one does not"


def test_a_gate_that_only_claims_an_instrument_would_be_noticed(candidates) -> None:
    decorated = Gate("X", "says that it compares", lambda case, tools: holds("gate.checksums-same"), ("same",))
    assert word(decorated, candidates, "biases missing", None) == word(decorated, candidates, "biases missing", "common-only")


def called(gate: Gate, candidates: Candidates, wrong: str = "") -> set[str]:
    """Names of the instruments that a gate calls, where all of them are within its reach."""
    names: set[str] = set()

    def counted(name: str) -> Measure:
        def measure(*args: Any) -> Any:
            names.add(name)
            return INSTRUMENTS[name].measure(*args)

        return measure

    tools = InstrumentSet({name: counted(name) for name in INSTRUMENTS})
    file = CandidateFile(candidates.healthy)
    gate.look(GateCase(candidates.ref, file, instruments=tools, tested=instruments.selftest()), tools)
    return names


@pytest.mark.parametrize("id", list(GATES))
def test_a_gate_calls_the_instruments_that_it_names_and_no_other(candidates, id) -> None:
    assert called(GATES[id], candidates) == set(GATES[id].rests_on)


def test_a_gate_cannot_reach_an_instrument_that_it_does_not_name(candidates) -> None:
    sly = Gate("X", "", lambda case, tools: holds("gate.no-garbage", answers=tools["garbage"]("4")), ("same",))
    assert called(sly, candidates) == {"garbage"}, "counted where all are within reach"
    with pytest.raises(KeyError, match="garbage"):
        ask(sly, candidates.case("biases missing", InstrumentSet()))


def test_an_unknown_instrument_is_refused_by_its_code() -> None:
    with pytest.raises(UsageError) as caught:
        InstrumentSet({"scale": len})
    assert caught.value.code == "instruments.unknown"


def test_exhibits_measure_nothing_in_this_package_and_all_others_do() -> None:
    exhibits = {i.name for i in INSTRUMENTS.values() if i.exhibit}
    named = {name for gate in GATES.values() for name in gate.rests_on}
    elsewhere = {"norm": "gates/ten_stages.py", "trace": "tracing/comparisons.py", "fixture": "instruments/self_test.py"}
    assert exhibits | named | elsewhere.keys() == INSTRUMENTS.keys() and not exhibits & named
    assert "aprlab.instruments.exhibits" in imported_by("aprlab.instruments.self_test")
    root = Path(aprlab.__file__).parent
    users = [
        module for path in root.rglob("*.py")
        if "aprlab.instruments.exhibits" in imported_by(module := module_of(path, root))
    ]  # fmt: skip
    assert sorted(users) == ["aprlab.instruments", "aprlab.instruments.self_test"]


def module_of(path: Path, root: Path) -> str:
    parts = ("aprlab", *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(module: str) -> set[str]:
    root = Path(aprlab.__file__).parent.parent
    path = root.joinpath(*module.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    tree = ast.parse(source)
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
