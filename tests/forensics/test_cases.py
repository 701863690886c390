"""Cases: read from files, ranked together as they would be alone, and held against what is known of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pages import page_script

from aprlab.cli.app import run_cli
from aprlab.errors import AprlabError
from aprlab.faults import FAULTS, session_with
from aprlab.faults.text import CHATML
from aprlab.forensics.answer_scoring import AnswerScore, Suspect
from aprlab.forensics.bench import with_template
from aprlab.forensics.cases import Case, rank_cases, read_cases, standing
from aprlab.forensics.ranking import FITS, Forensics, forensics
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.paths import data_dir

FEW = ["q4k-nibble-pairs", "rope-norm", "prompt-lost"]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return open_model(tiny)


def test_keys_of_public_collections_are_understood() -> None:
    case = Case.of_json({
        "id": "x", "prompt": "Hi", "output": "Ð°", "output_decoded": "а", "mode": "RAW, 7 tokens", "system": "none",
        "cause": "somebody's words", "certainty": "high",
    })  # fmt: skip
    assert (case.text, case.template, case.system, case.cause) == ("а", "none", None, ())
    assert Case.of_json({"prompt": "Hi", "output": "x", "mode": "chat", "system": "none"}).template == "chatml-without-system"
    assert Case.of_json({"prompt": "Hi", "text": "x"}).template == "file"
    assert Case.of_json({"prompt": "Hi", "token_ids": [1, 2]}).saw == [1, 2]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "cases.not-json"),
        ("3", "cases.no-prompt"),
        ('{"text": "x"}', "cases.no-prompt"),
        ('{"prompt": "x"}', "cases.no-answer"),
        ('{"prompt": "x", "text": "y", "template": "alpaca"}', "cases.unknown-template"),
        ('{"prompt": "x", "text": "y", "cause": ["no-such"]}', "faults.unknown"),
    ],
)
def test_what_is_no_case_is_refused(text: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text(text)
    with pytest.raises(AprlabError) as error:
        read_cases(path)
    assert error.value.code == code
    with pytest.raises(AprlabError):
        read_cases(tmp_path / "none.json")


def test_the_template_is_chosen_by_name(model: Model) -> None:
    session = Session(model)
    bare = with_template(session, CHATML)
    text = session.tokenizer.decode(bare.prompt_tokens("Hi"))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert bare.prompt_tokens("Hi") != session.prompt_tokens("Hi")


def test_cases_ranked_together_find_their_faults(model: Model) -> None:
    asked = (("a", "What is 2+2?", "file", "q4k-nibble-pairs"), ("b", "What is 2+2?", "chatml-without-system", "rope-norm"),
             ("c", "What is 3+4?", "none", "prompt-lost"))  # fmt: skip
    cases = []
    for id, prompt, template, fault in asked:
        session = with_template(Session(model), CHATML) if template == "chatml-without-system" else Session(model)
        said = session_with(session, [fault]).generate(prompt, raw=template == "none", max_tokens=8)
        cases.append(Case(id, prompt, said.text, template=template, cause=(fault,)))
    found = rank_cases(model, cases, faults=FEW, engine="reference")
    for case in cases:
        where = standing(found[case.id], case.cause)
        assert where.rank == 1, case.id
        assert where.score > FITS
    alone = forensics(model, cases[0].text, faults=FEW[:2]).suspects[0]
    assert alone.faults == found["a"].suspects[0].faults


def test_a_flood_is_what_samplers_make_of_nan(model: Model) -> None:
    """Whatever broke the numbers: the faults whose logits are none come first, and say through which sampler."""
    ids = {"H": [39] * 6, "R": [49] * 6, "last": [model.config.vocab_size - 1]}
    cases = [Case(name, "What is 2+2?", token_ids=tuple(saw), cause=("nan-sampled",)) for name, saw in ids.items()]
    found = rank_cases(model, cases, faults=["rope-norm", "nan-sampled", "lost-k-biases"], engine="reference")
    for case in cases:
        assert found[case.id].suspects[0].faults == ("nan-sampled",)
        assert standing(found[case.id], case.cause).rank == 1
    assert "top-k 50" in found["R"].suspects[0].cut
    words = Case("words", "What is 2+2?", "Wednesday bird elephant", cause=("nan-sampled",))
    assert standing(rank_cases(model, [words], faults=["nan-sampled"], engine="reference")["words"], words.cause).score < FITS


def test_ranks_count_what_is_level_by_half(model: Model) -> None:
    case = Case("x", "What is 2+2?", "Wednesday bird elephant", cause=("rope-norm",))
    found = rank_cases(model, [case], faults=["rope-norm", "q4k-min-lost"], engine="reference")["x"]
    assert standing(found, ("lost-v-biases",)).rank == 0  # was not tried
    assert standing(found, ("rope-norm", "q4k-min-lost")).rank == 1


def test_whatever_lost_the_numbers_is_one_explanation() -> None:
    """A flood cannot say which fault it was; a set that says it for another reason is a rival."""
    match = AnswerScore(1.0, 1.0, 1.0, 1.0, 1.0, None, ())
    lost = [Suspect((id,), "HHH", (39, 39, 39), match, flood=39) for id in ("default-kernel", "scales-flushed", "kq-fp16")]
    said = [Suspect((id,), "HHH", (39, 39, 39), match) for id in ("rope-norm", "no-rope")]
    healthy = Suspect((), "4.", (1,), None)

    def rank(*suspects: Suspect) -> tuple[int, int]:
        where = standing(Forensics("HHH", [39] * 3, "Hi", healthy, list(suspects)), ("kq-fp16",))
        return where.rank, where.level

    assert rank(*lost) == (1, 2)
    assert rank(*lost, *said) == (2, 4)
    assert rank(*said, replace(lost[2], flood=None)) == (2, 2)


def test_the_cases_of_the_project_are_sound() -> None:
    cases = read_cases(data_dir() / "evidence.json")
    assert len({case.id for case in cases}) == len(cases) > 20
    assert all(case.url.startswith("https://") and case.model and case.note for case in cases)
    assert all(set(case.cause) <= set(FAULTS) for case in cases)
    assert all(bool(case.cause) == (case.certainty != "open") for case in cases)


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.skipif(not DOCS.exists(), reason="not in a checkout")
def test_the_table_is_made_from_the_record() -> None:
    exam = page_script("exam")
    record = exam.kept()
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    made = exam.table(record, read_cases(data_dir() / "evidence.json"))
    assert made in page, "run: python docs/make/exam.py --page"


def test_the_verb(tiny: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = session_with(model, ["rope-norm"]).generate("What is 2+2?", max_tokens=8).text
    path = tmp_path / "case.json"
    path.write_text(json.dumps({"id": "mine", "prompt": "What is 2+2?", "text": text, "cause": ["rope-norm"]}))
    args = ["forensics", str(tiny), "--case", str(path), "--only", "rope-norm,lost-k-biases", "-e", "reference"]
    assert run_cli([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mine"]["suspects"][0]["faults"] == ["rope-norm"]
    assert run_cli(args) == 0
    assert "rope-norm comes 1." in capsys.readouterr().out
