"""Servers: judged by what they answer, and never trusted with more than an answer's bytes and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import Ids, Manners, serving
from threadpoolctl import threadpool_limits
from variants import first_layers

from aprlab.cli.app import run_cli
from aprlab.engines.contract_engine import ContractEngine
from aprlab.engines.contracts import Contract
from aprlab.engines.reference import ReferenceEngine
from aprlab.errors import AprlabError, UsageError
from aprlab.faults import FAULTS, session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.onion import server_peeling
from aprlab.onion.source_peeling import peel_sources
from aprlab.onion.verdict import Verdict
from aprlab.sources import json_http, source
from aprlab.sources.servers import ServerSource

PROMPT = "Hi"
PLAIN = ",activations=f32,cache=f32"  # the contract of the engine behind the server


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    """The first layer of the embedded model."""
    return first_layers(open_model(tiny), 1)


@pytest.fixture(scope="module")
def healthy(model: Model) -> Session:
    return Session(model, engine="reference")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are dearer on two: the other one waits."""
    with threadpool_limits(1):
        yield


@pytest.fixture(autouse=True)
def few_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of the catalogue to be wrong with; all of it takes 20 s (docs/sources.md has the figures)."""
    some = ("rope-theta", "rope-norm", "gqa-modulo", "lost-k-biases", "wrong-norm", "kv-empty")
    monkeypatch.setattr(server_peeling, "FAULTS", {id: FAULTS[id] for id in some})


def judged(model: Model, session: Session, manners: Manners, options: str = PLAIN) -> Verdict:
    with serving(session, manners) as server:
        return peel_sources(model, [server.url + options], prompt=PROMPT)


def codes(verdict: Verdict) -> list[str]:
    return [finding.code for finding in verdict.findings]


# ── healthy ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "manners",
    [
        Manners(), Manners(shape="bytes", most=5), Manners(shape="legacy", most=5), Manners(takes_ids=False),
        Manners(has_chat=False), Manners(shape="legacy", takes_ids=False, has_chat=False),
    ],
)  # fmt: skip
def test_a_healthy_server_is_within_its_contract(model: Model, healthy: Session, manners: Manners) -> None:
    verdict = judged(model, healthy, manners)
    assert (verdict.verdict, verdict.findings) == ("equivalent", [])
    asked = [body.get("top_logprobs", body.get("logprobs")) for _, _, body in manners.heard]
    assert asked[-1] == manners.most


def test_text_alone_proves_little(model: Model, healthy: Session) -> None:
    verdict = judged(model, healthy, Manners(shape="none"))
    assert (verdict.verdict, verdict.exit_code) == ("unproved", 4)
    assert set(codes(verdict)) == {"forward.server-text-alone"}


def test_a_server_is_a_source_of_answers(model: Model, healthy: Session) -> None:
    ids = healthy.prompt_tokens(PROMPT)
    with serving(healthy) as server, source(server.url + "/v1", model) as theirs:
        assert isinstance(theirs, ServerSource)
        assert (theirs.model_name, str(theirs.contract)) == ("tiny", "q8, cache f16")
        assert theirs.answer(ids, 3) == healthy.generate(ids, max_tokens=3).tokens
        with pytest.raises(UsageError) as caught:
            theirs.run(ids)
    assert caught.value.code == "source.no-values"


# ── what is wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


def penalised(logits: np.ndarray, seen: Ids) -> np.ndarray:
    out, at = logits.copy(), np.unique(seen)
    out[at] = np.where(out[at] > 0, out[at] / 1.1, out[at] * 1.1)
    return out


def broken_cache(logits: np.ndarray, step: int) -> np.ndarray:
    return logits[::-1] if step > 2 else logits


@pytest.mark.parametrize(
    ("manners", "code", "parameters"),
    [
        (Manners(figures=lambda logits, seen: logits / 0.8), "forward.server-scaled", {"form": "temperature 0.8"}),
        (Manners(figures=penalised), "forward.server-scaled", {"form": "a penalty of 1.1 for tokens of prompt and answer"}),
        (Manners(choose=1), "forward.server-sampling", {"step": 0}),
        (Manners(decoded=broken_cache), "forward.server-decode", {"step": 3}),
        (Manners(figures=lambda logits, seen: np.roll(logits, 1)), "forward.server-step", {"step": 0}),
    ],
)  # fmt: skip
def test_how_tokens_are_taken(
    model: Model, healthy: Session, manners: Manners, code: str, parameters: dict[str, Any]
) -> None:
    verdict = judged(model, healthy, manners)
    assert (verdict.verdict, codes(verdict)) == ("broken", [code])
    assert verdict.findings[0].parameters.items() >= parameters.items()


def spelt_as_text(session: Session, text: str) -> Ids:
    return session.tokenizer.encode(session.tokenizer.decode(session.chat_tokens(text)), parse_special=False)


def put_in_front(ids: Ids) -> Ids:
    return [832, *ids]  # <|endoftext|>, the bos_token


@pytest.mark.parametrize(
    ("made", "request_", "form"),
    [
        (lambda s: Manners(chat_prompt=s.raw_tokens), "chat", "no template"),
        (lambda s: Manners(chat_prompt=lambda t: s.chat_tokens(t)[1:]), "chat", "without its first token"),
        (lambda s: Manners(chat_prompt=lambda t: s.chat_tokens(t)[:-1]), "chat", "without its last"),
        (lambda s: Manners(chat_prompt=lambda t: spelt_as_text(s, t)), "chat", "control tokens spelt as text"),
        (lambda s: Manners(takes_ids=False, prompt=put_in_front), "completions", "bos_token put in front"),
    ],
)  # fmt: skip
def test_another_prompt_is_named(
    model: Model, healthy: Session, made: Callable[[Session], Manners], request_: str, form: str
) -> None:
    verdict = judged(model, healthy, made(healthy))
    assert codes(verdict) == ["tokenizer.server-prompt"]
    found = verdict.findings[0].parameters
    assert found["request"] == request_ and found["form"].startswith(form)


def test_an_unknown_prompt_is_no_fault_of_the_run(model: Model, healthy: Session) -> None:
    verdict = judged(model, healthy, Manners(chat_prompt=lambda text: healthy.raw_tokens("zzz" + text)))
    assert codes(verdict) == ["tokenizer.server-prompt-unknown"]


@pytest.mark.parametrize("fault", ["rope-theta", "gqa-modulo", "lost-k-biases"])
def test_a_fault_of_the_run_is_named_and_proved(model: Model, fault: str) -> None:
    verdict = judged(model, session_with(model, [fault], "reference"), Manners(shape="legacy", most=5))
    assert (verdict.verdict, verdict.faults) == ("broken", [fault])
    assert verdict.first_divergence is not None and verdict.first_divergence["point"] == "step 0 of the answer"
    assert verdict.repair is not None
    equal, of = verdict.repair.proof["with the fault in our engine"]["likeliest token equal"].split(" of ")
    assert equal == of


def test_another_number_of_the_config_is_named(model: Model) -> None:
    session = Session(ReferenceEngine(model), config=replace(model.config, rope_theta=5e5))
    verdict = judged(model, session, Manners())
    assert codes(verdict) == ["forward.server-number"]
    assert verdict.findings[0].parameters == {"field": "rope_theta", "found": 5e5, "expected": model.config.rope_theta}


def test_other_text_is_placed(model: Model, healthy: Session) -> None:
    verdict = judged(model, healthy, Manners(shape="none", choose=1))
    assert codes(verdict) == ["forward.server-text"]
    assert verdict.findings[0].parameters["step"] == 0


def test_another_contract_is_no_fault(model: Model, healthy: Session) -> None:
    session = Session(ContractEngine(model, Contract("q8", "f16")))
    assert judged(model, session, Manners(), "").findings == []  # as declared
    found = judged(model, session, Manners())
    assert (found.verdict, codes(found)) == ("equivalent", ["forward.contract-differs"])
    assert found.findings[0].parameters["found"] == "q8, cache f16"


# ── ill manners ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mood", "code"),
    [
        ("not json", "server.not-json"), ("deep", "server.not-json"), ("list", "server.shape"), ("no choices", "server.shape"),
        ("text is a number", "server.shape"), ("logprob is text", "server.shape"), ("logprob is NaN", "server.shape"),
        ("logprob above 0", "server.shape"), ("id outside", "server.other-vocabulary"), ("more than asked", "server.shape"),
        ("500", "server.status"), ("redirect", "server.status"), ("cut off", "server.unreachable"),
        ("drops", "server.unreachable"), ("hangs", "server.timeout"), ("drips", "server.timeout"), ("flood", "server.too-long"),
    ],
)  # fmt: skip
def test_an_ill_mannered_server_is_one_line(
    model: Model, healthy: Session, mood: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(json_http.KEY, "secret-key")
    started = time.monotonic()
    with serving(healthy, Manners(mood=mood)) as server, pytest.raises(AprlabError) as caught:
        theirs = ServerSource(server.url, model, seconds=0.4 if code == "server.timeout" else 30)
        theirs.complete([1, 2], 1)
    assert caught.value.code == code
    said = str(caught.value)
    assert "\n" not in said and "\x1b" not in said and "secret-key" not in said and len(said) < 400
    assert time.monotonic() - started < (4 if code == "server.timeout" else 25)


def test_bytes_that_are_none_are_not_believed(model: Model, healthy: Session) -> None:
    with serving(healthy, Manners(mood="bytes is a number")) as server:
        assert ServerSource(server.url, model).complete([1], 1).steps[0].token == 5


def test_the_key_goes_to_the_server_alone(model: Model, healthy: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(json_http.KEY, "secret-key")
    manners = Manners()
    with serving(healthy, manners) as server:
        ServerSource(server.url, model).complete([1, 2], 1)
    assert manners.heard[0][1]["Authorization"] == "Bearer secret-key"
    for url in ("http://example.org", "http://10.0.0.1:80"):
        with pytest.raises(UsageError) as caught:
            json_http.JsonServer(url)
        assert caught.value.code == "server.key" and "secret-key" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://", "ftp://x", "http://me:pa55@127.0.0.1", "http://127.0.0.1/?key=pa55", "http://127.0.0.1:99999"]
)
def test_an_address_with_more_in_it_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        json_http.JsonServer(url)
    assert caught.value.code == "server.address" and "pa55" not in str(caught.value)


@pytest.mark.parametrize("options", [",heat=1", ",seconds=no", ",seconds=0", ",flash=maybe", ",activations=f8"])
def test_options_of_a_server(model: Model, options: str) -> None:
    with pytest.raises(UsageError):
        source("http://127.0.0.1:9" + options, model)


def test_the_command_line(tiny: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_cli(["peel", str(tiny), "--source", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9: cannot be reached" in capsys.readouterr().err
    with serving(Session(open_model(tiny), engine="reference")) as server:
        assert run_cli(["trace", str(tiny), "--source", server.url, "-o", str(tmp_path / "t.npz")]) == 2
    assert "gives no whole values" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
