"""Forensics: a fault's own words lead back to it, others' words do not, and silence is a word, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pages import page_script

from aprlab.cli.app import run_cli
from aprlab.errors import UsageError
from aprlab.faults import session_with
from aprlab.forensics.answer_runs import divergence
from aprlab.forensics.answer_scoring import AnswerScore, AnswerScorer, Suspect, rhythm
from aprlab.forensics.ranking import FITS, Forensics, forensics
from aprlab.forensics.signatures import Signatures, fault_signatures
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.paths import data_dir

LOUD = ["lost-k-biases", "q4k-nibble-pairs", "rope-norm", "byte-level-text"]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return open_model(tiny)


@pytest.fixture(scope="module")
def recorded(model: Model) -> Signatures:
    return fault_signatures(model, ["What is 2+2?", "What is 3+4?"], faults=[*LOUD, "cache-key-mismatch", "lost-v-biases"])


@pytest.mark.parametrize("guilty", LOUD)
def test_its_own_words_lead_back_to_a_fault(guilty: str, model: Model, recorded: Signatures) -> None:
    text = recorded.said[guilty][0]
    assert text != recorded.healthy[0]
    found = forensics(model, text, faults=LOUD)
    assert found.best is not None
    best = found.suspects[0]
    assert best.match is not None
    rivals = [s for s in found.suspects if s.faults == (guilty,)]
    assert rivals[0].match is not None
    assert rivals[0].match.score == best.match.score > 0.5  # first, or level with a fault that says the very same


def test_a_pair_is_found_by_growing_sets(model: Model) -> None:
    pair = ("q4k-nibble-pairs", "byte-level-text")
    said = session_with(model, pair).generate("What is 2+2?", max_tokens=10).text
    alone = [session_with(model, [id]).generate("What is 2+2?", max_tokens=10).text for id in pair]
    assert said not in alone
    found = forensics(model, said, faults=[*pair, "rope-norm"], depth=2, width=1)
    assert found.suspects[0].faults == pair
    assert found.suspects[0].match is not None
    assert found.suspects[0].match.score == 1
    assert "same words" in found.suspects[0].match.why


def test_sets_are_tried_together_and_line_ends_forgiven(model: Model) -> None:
    said = session_with(model, ["prompt-lost"]).generate("What is 2+2?", max_tokens=10).text
    assert "\n" in said.strip()
    pasted = "".join(said.splitlines()).strip()  # as a table in a bug report shows it
    found = forensics(model, pasted, faults=["rope-norm", "prompt-lost+byte-level-text", "prompt-lost"])
    assert found.suspects[0].faults == ("prompt-lost",)
    assert found.suspects[0].match is not None
    assert found.suspects[0].match.score == 1
    assert {s.faults for s in found.suspects} == {("rope-norm",), ("prompt-lost", "byte-level-text"), ("prompt-lost",)}


def test_what_a_text_costs(model: Model) -> None:
    """The likelihood of a text under a fault, from one pass, is that of its tokens one by one."""
    session = session_with(model, ["rope-norm"])
    ids, said = session.prompt_tokens("What is 2+2?"), [3, 200, 7]
    rows = session.follow(ids, said)
    for n in range(len(said)):
        alone = Session(session.engine, config=session.config).generate([*ids, *said[:n]], max_tokens=1, keep_logits=True).logits
        assert alone is not None
        assert np.allclose(rows[n], alone[0], atol=1e-4 * np.abs(alone).max())
    with pytest.raises(UsageError, match="an answer"):
        session.follow(ids, [])


def test_an_answer_is_left_where_it_leads_elsewhere(model: Model, recorded: Signatures) -> None:
    """But never one that goes on to say what was seen; and what is healthy to the last bit is not run twice."""
    found = forensics(model, recorded.said["q4k-nibble-pairs"][0], faults=["q4k-nibble-pairs", "rope-norm", "cache-key-mismatch"])
    cut = {s.faults[0]: s.cut for s in found.suspects}
    assert not cut["q4k-nibble-pairs"]
    assert "healthy logits" in cut["cache-key-mismatch"]
    assert next(s.text for s in found.suspects if s.faults == ("cache-key-mismatch",)) == recorded.healthy[0]


def test_nothing_fits_a_text_that_no_fault_says(model: Model) -> None:
    found = forensics(model, "Wednesday bird elephant Wednesday bird elephant", faults=LOUD)
    assert found.best is None
    assert found.conclusion == "nothing fits"


def test_healthy_words_are_called_healthy(model: Model, recorded: Signatures) -> None:
    assert forensics(model, recorded.healthy[0], faults=["rope-norm"]).conclusion == "that is what the healthy model says"


def test_saying_nothing_is_a_signature(model: Model) -> None:
    """The embedded model without its V biases ends at once."""
    assert session_with(model, ["lost-v-biases"]).generate("What is 2+2?", max_tokens=4).tokens == []
    found = forensics(model, "", faults=["lost-v-biases", "q4k-min-lost"])
    assert found.suspects[0].faults == ("lost-v-biases",)
    assert found.suspects[0].match is not None
    assert found.suspects[0].match.score == 1
    assert found.suspects[1].match is not None
    assert found.suspects[1].match.score < FITS


def test_what_cannot_run_says_why_and_comes_last(model: Model) -> None:
    found = forensics(model, "4.", faults=["template-lost", "q5k-layout", "rope-norm"])
    assert found.suspects[0].faults == ("rope-norm",)
    assert {s.faults[0]: bool(s.error) for s in found.suspects[1:]} == {"template-lost": True, "q5k-layout": True}


def test_rare_tokens_weigh_more_than_common_ones(model: Model) -> None:
    tokenizer = Session(model).tokenizer
    surprise = np.full(model.config.vocab_size, 2.0)
    surprise[[7, 8]] = 18.0
    scorer = AnswerScorer([5, 7, 5, 8], surprise, tokenizer)

    def judge(*tokens: int) -> AnswerScore:
        return scorer.judge(Suspect((), tokenizer.decode(tokens), tokens, None))

    rare, common = judge(7, 8, 1, 1), judge(5, 5, 1, 1)
    assert rare.tokens == pytest.approx(36 / 40)
    assert common.tokens == pytest.approx(4 / 40)
    assert rare.score > 3 * common.score
    assert judge(5, 7, 5, 8).score == 1
    assert judge(8, 5, 7, 5).score < 1  # the same tokens in another order
    assert len(rare.shared) == 2
    assert not common.shared


def test_rhythm_tells_repetitions_apart() -> None:
    assert rhythm([4, 4, 4, 4])[0] == 1
    assert rhythm([4, 5, 4, 5])[:2] == [0, 1]
    assert rhythm([1, 2, 3, 4])[-1] == 1


def test_signatures_are_counted_and_silence_is_named(recorded: Signatures) -> None:
    assert recorded.silent == ["cache-key-mismatch"]
    assert recorded.moved["cache-key-mismatch"] == 0 < recorded.moved["rope-norm"]
    assert 0 < recorded.counted <= 2 * 5
    assert 0 <= recorded.top1 <= recorded.top3 <= 1
    assert Signatures.from_json(json.loads(json.dumps(recorded.to_json()))) == recorded
    with pytest.raises(UsageError, match="two prompts"):
        fault_signatures("unused", ["one"])


def test_likelihood_takes_part_where_it_was_measured(model: Model) -> None:
    tokenizer = Session(model).tokenizer
    scorer = AnswerScorer([5, 7, 5, 8], np.full(model.config.vocab_size, 9.0), tokenizer)
    answer = Suspect((), tokenizer.decode([7, 1]), (7, 1), None)
    plain, useless, likely = (scorer.judge(answer, gain).score for gain in (None, -3.0, 6.0))
    assert useless == pytest.approx(0.7 * plain)
    assert likely == pytest.approx(0.7 * plain + 0.3 * 6 / 8)
    few, prompts = ["lost-k-biases", "q4k-scale-bits"], ["What is 2+2?", "What is 3+4?"]
    alone, both = (fault_signatures(model, prompts, faults=few, follow=follow) for follow in (False, True))
    assert (alone.said, alone.counted, alone.alone, alone.followed) == (both.said, both.counted, both.alone, not both.followed)
    assert alone.alone == (alone.top1, alone.top3)


def test_divergence_is_a_distance_of_distributions() -> None:
    a, b = np.array([0.0, 1.0, 2.0], np.float32), np.array([2.0, 1.0, 0.0], np.float32)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (a.astype(np.float64), b.astype(np.float64)))
    assert divergence(a, b) == pytest.approx(float((p * np.log2(p / q)).sum()))
    assert divergence(a, a + 3) == pytest.approx(0, abs=1e-12)  # a constant changes no distribution
    assert divergence(a, np.full(3, np.nan, np.float32)) == float("inf")


def test_the_page_is_made_from_the_record(recorded: Signatures) -> None:
    entry = {"command": "python -m x", "date": "2026-01-01", "engine": "reference", **recorded.to_json()}
    text = page_script("signatures").page({"note": "Mind this.", "models": {"tiny": entry}})
    assert "| tiny | 2 | 6 | 1 |" in text
    assert "Silent: `cache-key-mismatch` (0)." in text
    assert "*(ends at once)*" in text  # without V biases
    assert "Mind this." in text
    assert len([line for line in text.splitlines() if line.startswith("| `")]) == 6


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.skipif(not DOCS.exists(), reason="not in a checkout")
def test_docs_are_the_record() -> None:
    record = json.loads((data_dir() / "signatures.json").read_text(encoding="utf-8"))
    assert (DOCS / "signatures.md").read_text(encoding="utf-8") == page_script("signatures").page(record)


def test_the_verb(tiny: Path, capsys: pytest.CaptureFixture[str], recorded: Signatures) -> None:
    saw = recorded.said["q4k-nibble-pairs"][0]
    args = ["forensics", str(tiny), "--saw", saw, "--only", "rope-norm,q4k-nibble-pairs", "-b", "reference"]
    assert run_cli([*args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["suspects"][0]["faults"] == ["q4k-nibble-pairs"]
    assert run_cli(args) == 0
    assert "q4k-nibble-pairs fits best" in capsys.readouterr().out
    assert run_cli([*args[:4], "--only", "no-such"]) == 2
    assert "unknown fault 'no-such'" in capsys.readouterr().err


def test_it_shows_in_a_notebook(model: Model) -> None:
    found: Forensics = forensics(model, "4.", faults=["rope-norm"])
    assert "<table>" in found._repr_html_()


# ── the third layer of the ticket ─────────────────────────────────────────────────────────────────────────────────


def test_the_record_of_the_third_layer_says_what_the_page_says() -> None:
    record = json.loads((data_dir() / "third-layer.json").read_text(encoding="utf-8"))
    assert {"exact", "old file", "ranking"} <= set(record["parts"]) <= set(page_script("third_layer_record").PARTS)
    exact, *less = record["parts"]["exact"]["suspects"]
    assert "".join(exact["text"].splitlines()).startswith(record["ticket"]["third layer"])
    assert exact["score"] == 1
    assert sorted(len(s["faults"]) for s in less) == [3, 3, 3, 3]  # each of the four left out, and none of these says it
    assert all(s["score"] < 0.5 for s in less)
    first, second = record["parts"]["ranking"]["suspects"][:2]
    assert first["faults"] == ["lost-qkv-biases"]
    assert first["score"] > FITS > second["score"] + 0.2
    old = record["parts"]["old file"]["suspects"][0]
    assert old["faults"] == ["last-token-twice", "prompt-lost"]
    assert old["text"].startswith(record["ticket"]["old file"])
    told = (DOCS / "third-layer.md").read_text(encoding="utf-8") if DOCS.exists() else ""
    for suspect in (exact, old) if told else ():
        assert suspect["text"].splitlines()[0] in told


def test_pairs_are_made_from_a_ranking() -> None:
    paired = page_script("third_layer_record").paired
    ran = [{"faults": [id], "error": None, "score": score} for id, score in (("a", 0.6), ("b", 0.4), ("c", 0.1), ("d", 0.0))]
    refused = {"faults": ["e"], "error": "refused"}
    assert paired({"suspects": [*ran, refused]}) == ["a+b", "a+c", "a+d", "b+c", "b+d"]
    assert paired({"suspects": [*ran[2:], refused]}) == ["c+d"]


@pytest.fixture(scope="module")
def healthy_15b(real_15b: Path) -> Iterator[Session]:
    """Loaded once: the faulty sessions below compute with its engine."""
    session = Session(open_model(real_15b), engine="jit")
    yield session
    session.engine.close()


@pytest.mark.real
def test_the_words_of_a_golden_reference(healthy_15b: Session) -> None:
    """All ten tokens that upstream recorded on 2026-01-31 (`gold-15b-jan31-b`), and not without either of the two."""

    def said(faults: list[str], most: int) -> list[int]:
        session = session_with(healthy_15b, ["template-hard-coded", *faults])
        return session.generate("What is 2+2?", max_tokens=most).tokens

    both = said(["lost-qkv-biases", "kv-refed"], 10)
    assert healthy_15b.tokenizer.decode(both) == "3_screen0 ErrorHandler1.WriteHeaderak0 autof1"
    for alone in ("lost-qkv-biases", "kv-refed"):
        assert said([alone], 3) != both[:3]  # another answer after three tokens, and so after ten


@pytest.mark.real
def test_the_words_of_the_ticket(healthy_15b: Session) -> None:
    """Its first three tokens: ``3``, ``,},`` with a line's end, and `` helf``."""
    session = session_with(healthy_15b, ["lost-qkv-biases", "template-hard-coded", "split-specials", "kv-refed"])
    assert session.generate("What is 2+2?", max_tokens=3).tokens == [18, 59999, 74403]
