"""What to believe of a text: a fault, several, none of these, or that nothing is broken; and how likely a text is at all."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from pages import page_script

from aprlab.faults import session_with
from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.likelihood import SLIP, TEMPERATURES, TextCost, marginal, null_bits, spoken
from aprlab.forensics.outcome import Forensics
from aprlab.forensics.posterior import PRIORS, posterior
from aprlab.forensics.ranking import forensics
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.paths import data_dir

FEW = ["q4k-nibble-pairs", "q4k-one-scale", "rope-norm", "lost-k-biases", "prompt-lost"]


def suspect(bits: float, *faults: str) -> Suspect:
    """With an answer of its own, unless it says the healthy words (`bits` 3 or 100 and no faults)."""
    text = "healthy" if bits == 3 or not faults else "broken"
    return Suspect(faults, text, (), None, costs=(bits,) * len(TEMPERATURES))


def test_a_text_costs_what_its_tokens_are_unlikely() -> None:
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]], np.float32)
    cost = TextCost.of(logits, [2, 1])
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    plain = [(1 - SLIP) * chance + SLIP / 3 for chance in (p[0, 2], p[1, 1])]
    assert cost.bits[TEMPERATURES.index(1.0)] == pytest.approx(-sum(map(math.log2, plain)))
    assert cost.rank == 1
    likely = TextCost.of(logits, [0, 1])
    assert likely.rank == 0
    assert likely.bits[0] < likely.bits[2] < cost.bits[2] < cost.bits[0]  # greedy says one thing only
    assert spoken(cost.bits, 2)[0] == pytest.approx(likely.bits[0], abs=0.2)
    assert spoken(cost.bits, 2)[1:] == cost.bits[1:]
    broken = TextCost.of(np.full((1, 3), np.nan, np.float32), [0])
    assert all(map(math.isfinite, broken.bits))


def test_an_unknown_temperature_is_each_of_them_alike() -> None:
    assert marginal([3.0, 3.0, 3.0]) == pytest.approx(3)
    assert marginal([1.0, math.inf, math.inf]) == pytest.approx(1 + math.log2(3))
    assert marginal([math.inf, math.inf]) == math.inf


def test_the_null_is_a_code_that_expects_repetition() -> None:
    surprise = np.log2(8) * np.ones(8)
    assert sum(2.0 ** -null_bits([3, 3, 5, token], surprise)[-1] for token in range(8)) == pytest.approx(1)
    first, again, *_ = null_bits([3, 3, 3, 3], surprise)
    assert first == pytest.approx(3)
    assert again < 1


def test_chances_add_up_and_bits_move_them() -> None:
    unlike = suspect(100.0)
    near, far = posterior(100.0, unlike, [suspect(5.0, "a"), suspect(90.0, "b")]), posterior(100.0, unlike, [suspect(99.0, "a")])
    for found in (near, far):
        assert found.healthy + found.fault + found.compound + found.none == pytest.approx(1)
    assert (near.answer, far.answer) == ("fault", "none")
    assert near.sets[0][0] == ("a",)
    pair = posterior(100.0, unlike, [suspect(60.0, "a"), suspect(5.0, "a", "b")])
    assert pair.answer == "compound"
    assert posterior(100.0, suspect(3.0), [suspect(90.0, "a")]).answer == "healthy"
    none = posterior(100.0, unlike, [])
    assert none.fault == 0
    assert none.answer == "none"
    assert sum(PRIORS.values()) == pytest.approx(1)
    flat = posterior(100.0, unlike, [suspect(5.0, "a"), suspect(5.0, "b")])
    assert flat.sets[0][1] == pytest.approx(flat.sets[1][1])  # what nothing tells apart shares
    silent = posterior(100.0, suspect(3.0), [suspect(3.0, "a"), suspect(3.0, "b")])
    assert silent.answer == "healthy"  # what says the healthy words cannot be told from a healthy model
    assert silent.sets == ()


@pytest.fixture(scope="module")
def session(tiny: Path) -> Session:
    return Session(open_model(tiny))


def asked(session: Session, text: str, faults: list[str]) -> Forensics:
    found = forensics(session, text, faults=faults)
    assert found.posterior is not None
    return found


def test_a_fault_that_is_left_out_is_none_of_these(session: Session) -> None:
    said = session_with(session, ["q4k-nibble-pairs"]).generate("What is 2+2?", max_tokens=8).text
    known, unknown = asked(session, said, FEW), asked(session, said, FEW[1:])
    assert known.posterior is not None
    assert unknown.posterior is not None
    assert known.posterior.answer == "fault"
    assert known.posterior.sets[0][0] == ("q4k-nibble-pairs",)
    assert unknown.posterior.answer == "none"
    assert unknown.belief.startswith("none of these")
    assert "nearest by likelihood" in unknown.belief
    assert "none of these" in unknown._repr_html_()
    assert unknown.to_json()["posterior"]["answer"] == "none"


def test_healthy_words_and_random_words(session: Session) -> None:
    healthy = asked(session, session.generate("What is 2+2?", max_tokens=8).text, FEW).posterior
    random = asked(session, "Wednesday bird elephant Saturday red water", FEW).posterior
    assert healthy is not None
    assert random is not None
    assert (healthy.answer, random.answer) == ("healthy", "none")


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.skipif(not DOCS.exists(), reason="not in a checkout")
def test_the_tables_are_the_record() -> None:
    script = page_script("calibration")
    record = json.loads((data_dir() / "calibration.json").read_text(encoding="utf-8"))
    assert script.table(record) in (DOCS / "evidence.md").read_text(encoding="utf-8"), "run: docs/make/calibration.py --page"
    for of in record.values():
        assert of["constants"] == asdict(script.MEASURED), "measured with other constants"
