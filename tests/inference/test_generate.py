"""Generation: what goes in, what comes out, when it ends, and what it refuses. Models are random, so texts are noise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import CONFIG, TEMPLATE, random_model, tokenizer_data

from aprlab.architectures import forward
from aprlab.engines.base import Cache
from aprlab.engines.reference import ReferenceEngine
from aprlab.errors import FormatError, NumericError, UsageError
from aprlab.inference.session import Generation, Sampling, Session, generate
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.model import Model

PROMPT = [5, 200, 17, 3]
TOKENS = tokenizer_data().tokens


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="module")
def session(model: Model) -> Session:
    return Session(model)


@pytest.fixture(scope="module")
def endless(model: Model) -> Session:
    """A session that no token ends."""
    session = Session(model, config=replace(CONFIG, context_length=1000))
    session.tokenizer.eog = frozenset()
    return session


def by_hand(model: Model, prompt: list[int], steps: int) -> list[int]:
    """Greedy ids by running the whole sequence again for every token: no cache, no session."""
    engine, tokens = ReferenceEngine(model), list(prompt)
    for _ in range(steps):
        logits = forward(engine, CONFIG, tokens, engine.new_cache(CONFIG, len(tokens)))
        tokens.append(int(np.argmax(logits[-1])))
    return tokens[len(prompt) :]


def test_greedy_is_the_argmax_of_every_step(endless: Session, model: Model) -> None:
    answer = endless.generate(PROMPT, max_tokens=12, keep_logits=True)
    assert answer.tokens == by_hand(model, PROMPT, 12)
    assert answer.prompt_tokens == PROMPT
    assert answer.stop == "length"
    assert len(set(answer.tokens)) > 3  # not one token forever, which would prove little
    assert answer.logits is not None
    assert answer.logits.shape == (12, CONFIG.vocab_size)
    assert answer.logits.argmax(-1).tolist() == answer.tokens
    assert answer.text == endless.tokenizer.decode(answer.tokens)


def test_all_three_ways_in_agree(model: Model, session: Session) -> None:
    """A model, an engine, a session; text, a conversation, ids."""
    ids = session.chat_tokens("hello", system="world")
    want = session.generate(ids, max_tokens=4).tokens
    assert generate(model, "hello", system="world", max_tokens=4).tokens == want
    assert generate(ReferenceEngine(model), ids, max_tokens=4).tokens == want
    turns = [{"role": "system", "content": "world"}, {"role": "user", "content": "hello"}]
    assert generate(session, turns, max_tokens=4).tokens == want
    assert generate(session, "hello", max_tokens=4).prompt_tokens != ids
    assert (
        session.tokenizer.decode(ids)
        == "<|im_start|>system\nworld<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_raw_is_the_text_itself(session: Session) -> None:
    answer = generate(session, "hello world", raw=True, max_tokens=1)
    assert [TOKENS[id] for id in answer.prompt_tokens] == ["hello", "Ġworld"]


def test_it_ends_at_end_of_generation_and_keeps_that_token_to_itself(model: Model) -> None:
    free = generate(model, PROMPT, max_tokens=8)
    third = free.tokens[2]
    assert third not in free.tokens[:2]
    tokenizer = Qwen2Tokenizer(tokenizer_data(eos_token_id=third))
    answer = Session(model, tokenizer=tokenizer).generate(PROMPT, max_tokens=8, keep_logits=True)
    assert answer.stop == "eos"
    assert answer.tokens == free.tokens[:2]
    assert answer.logits is not None
    assert answer.logits.shape[0] == 3  # the choice of the end was a choice too


def test_streaming_adds_up_to_the_text(endless: Session) -> None:
    seen: list[tuple[int, str]] = []
    answer = endless.generate(PROMPT, max_tokens=40, on_token=lambda id, text: seen.append((id, text)))
    assert "".join(text for _, text in seen) == answer.text
    ids = [id for id, _ in seen]
    assert ids[:40] == answer.tokens
    assert len(ids) in (40, 41)  # one more call where bytes were left over at the end


@pytest.mark.parametrize("cut", [3, 6])
def test_stop_strings_end_and_are_cut(endless: Session, cut: int) -> None:
    """The stop string spans tokens; nothing of it is streamed before it is known to be one."""
    free = endless.generate(PROMPT, max_tokens=30).text
    at = next(i for i in range(cut, len(free)) if free.find(free[i : i + 3]) == i)
    stop, seen = free[at : at + 3], []
    answer = endless.generate(PROMPT, max_tokens=30, stop=["never this", stop], on_token=lambda _, text: seen.append(text))
    assert answer.stop == "stop"
    assert answer.text == free[:at] == "".join(seen)
    missed = endless.generate(PROMPT, max_tokens=30, stop=["never this", ""])
    assert missed.text == free
    assert missed.stop == "length"


def test_json_has_what_was_promised(session: Session) -> None:
    answer = session.generate(PROMPT, max_tokens=3)
    made = json.loads(json.dumps(answer.to_json()))
    assert set(made) == {"prompt_tokens", "tokens", "text", "stop", "load", "timing", "engine", "contract", "engine_asked"}
    by_type = session.model.by_type()
    assert made["load"] == {
        "layers": 3,
        "quantised": sum(n for name, n in by_type.items() if name not in ("F32", "F16", "BF16")),
        "float": sum(n for name, n in by_type.items() if name in ("F32", "F16", "BF16")),
        "bytes": sum(t.nbytes for t in session.model.tensors.values()),
        "by_type": by_type,
    }
    assert set(made["timing"]) == {"load_seconds", "prompt_tokens_per_second", "decode_tokens_per_second"}
    assert all(value > 0 for value in made["timing"].values())
    assert session.generate(PROMPT, max_tokens=1).timing["decode_tokens_per_second"] is None


def test_a_full_context_ends_the_answer(model: Model) -> None:
    session = Session(model)
    session.tokenizer.eog = frozenset()
    answer = session.generate([1] * 120, max_tokens=50)
    assert (len(answer.tokens), answer.stop) == (8, "length")


# -- the session's memory ----------------------------------------------------------------------------------------------


class Counting(ReferenceEngine):
    """Counts the tokens that are really run."""

    ran = 0

    def embed(self, tokens: np.ndarray, weight: str) -> np.ndarray:
        self.ran += len(tokens)
        return super().embed(tokens, weight)


def test_a_common_beginning_is_run_once_and_changes_no_answer(model: Model) -> None:
    engine = Counting(model)
    session = Session(engine)
    first = session.generate(PROMPT, max_tokens=5)
    assert engine.ran == len(PROMPT) + 4
    follow_up = [*PROMPT, *first.tokens, 9, 8]
    engine.ran = 0
    second = session.generate(follow_up, max_tokens=5)
    assert engine.ran == 1 + 2 + 4  # the last answer's last token was never run
    assert second.tokens == generate(model, follow_up, max_tokens=5).tokens
    engine.ran = 0
    other = session.generate([PROMPT[0], 77, 78], max_tokens=5)
    assert engine.ran == 2 + 4
    assert other.tokens == generate(model, [PROMPT[0], 77, 78], max_tokens=5).tokens
    engine.ran = 0
    assert session.generate([PROMPT[0], 77, 78], max_tokens=5).tokens == other.tokens
    assert engine.ran == 1 + 4


def test_the_cache_grows(endless: Session) -> None:
    short = endless.generate(PROMPT, max_tokens=5)
    assert len(endless.generate(list(range(200)), max_tokens=100).tokens) == 100
    assert endless.generate(PROMPT, max_tokens=5).tokens == short.tokens


def test_a_cancelled_answer_leaves_a_usable_session(model: Model, session: Session) -> None:
    def cancel(id: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate([7, 7, 7, 1], max_tokens=5, on_token=cancel)
    assert session.generate([7, 7, 7, 2], max_tokens=5).tokens == generate(model, [7, 7, 7, 2], max_tokens=5).tokens


class BreaksInTheMiddle(ReferenceEngine):
    """Fails once, in the second layer of the second pass."""

    calls = 0

    def attend(self, q: Any, k: Any, v: Any, cache: Cache, layer: int, positions: np.ndarray) -> Any:
        self.calls += 1
        if self.calls == CONFIG.block_count + 2:
            raise KeyboardInterrupt
        return super().attend(q, k, v, cache, layer, positions)


def test_a_pass_cut_short_is_forgotten(model: Model) -> None:
    session = Session(BreaksInTheMiddle(model))
    with pytest.raises(KeyboardInterrupt):
        session.generate(PROMPT, max_tokens=5)
    assert session.generate(PROMPT, max_tokens=5).tokens == generate(model, PROMPT, max_tokens=5).tokens


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_sampling_repeats_with_its_seed(session: Session) -> None:
    def draw(seed: int | None) -> list[int]:
        return generate(session, PROMPT, max_tokens=12, temperature=1.5, seed=seed).tokens

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in (1, 2, 3, 4)}) > 1
    assert draw(None) != draw(None)


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    rng = np.random.default_rng(0)

    def shares(sampling: Sampling) -> np.ndarray:
        return np.bincount([sampling.choose(logits, rng) for _ in range(4_000)], minlength=4) / 4_000

    # of 4,000 draws a share is off by 0.008 at one sigma
    np.testing.assert_allclose(shares(Sampling(1.0)), [0.1, 0.2, 0.3, 0.4], atol=0.045)
    squared = np.array([0.01, 0.04, 0.09, 0.16])
    np.testing.assert_allclose(shares(Sampling(0.5)), squared / squared.sum(), atol=0.045)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.6)), [0, 0, 3 / 7, 4 / 7], atol=0.045)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.1)), [0, 0, 0, 1], atol=0)
    assert Sampling().choose(np.array([1.0, 3.0, 3.0]), rng) == 1


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(-1, 1), (float("nan"), 1), (float("inf"), 1), (1, 0), (1, 1.1), (1, float("nan"))]
)
def test_senseless_sampling(temperature: float, top_p: float) -> None:
    with pytest.raises(UsageError, match=r"temperature|top_p"):
        Sampling(temperature, top_p)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ("", {"raw": True}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ([{"role": "user", "content": ""}], {}, "prompt is empty"),
        ([300], {}, "token 300 is outside"),
        (PROMPT, {"max_tokens": 0}, "max_tokens 0"),
        ([1] * 128, {}, "128 prompt tokens leave no room in a context of 128"),
        (PROMPT, {"system": "x"}, "no system message"),
        ("x", {"system": "x", "raw": True}, "no system message"),
        ("x", {"temperature": -1.0}, "temperature"),
    ],
)
def test_senseless_requests(session: Session, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(session, prompt, **options)


def with_template(template: str | None) -> Model:
    model = random_model()
    model.make_tokenizer = lambda: tokenizer_data(chat_template=template)
    return model


def test_no_template_and_hostile_template() -> None:
    bare = Session(with_template(None))
    with pytest.raises(UsageError, match="no chat template"):
        bare.generate("hello")
    assert bare.generate("hello", raw=True, max_tokens=1).tokens
    with pytest.raises(FormatError, match="template fails"):
        generate(with_template("{{ ''.__class__.__mro__ }}"), "hello")
    assert TEMPLATE in Session(with_template(TEMPLATE)).model.tokenizer.chat_template  # type: ignore[operator]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [0, 2])
def test_logits_that_are_no_numbers_name_their_step(value: float, step: int) -> None:
    class Poisoned(ReferenceEngine):
        passes = 0

        def matmul(self, x: np.ndarray, weight: str, bias: str | None = None) -> np.ndarray:
            y = super().matmul(x, weight, bias)
            if weight == "output.weight":
                self.passes += 1
                if self.passes == step + 1:
                    y[0, 11] = value
            return y

    with pytest.raises(NumericError, match=rf"step {step}: {int(np.isnan(value))} NaN and {int(np.isinf(value))} Inf among 300"):
        generate(Poisoned(random_model()), PROMPT, max_tokens=5)


def test_a_model_without_a_bias_is_refused_before_it_speaks() -> None:
    model = random_model()
    del model.tensors["blk.1.attn_k.bias"]
    with pytest.raises(FormatError, match=r"blk\.1\.attn_k\.bias"):
        generate(model, PROMPT)


def test_nan_weights_end_in_a_numeric_error() -> None:
    model = random_model()
    norm = model.tensors["blk.2.ffn_norm.weight"]
    raw = np.full(norm.shape, np.nan, np.float32).view(np.uint8)
    model.tensors[norm.name] = norm.replace(raw=raw)
    with pytest.raises(NumericError, match="step 0: 300 NaN"):
        generate(model, PROMPT)


def test_generation_prints_without_its_logits(session: Session) -> None:
    answer: Generation = session.generate(PROMPT, max_tokens=2, keep_logits=True)
    assert "logits" not in repr(answer)


def test_a_session_takes_over_what_another_has_run_and_forgets_it(model: Model) -> None:
    first = Session(model)
    answer = first.generate([5, 6, 7], max_tokens=3, keep_logits=True)
    second = Session(first.engine, cache_of=first)
    calls: list[int] = []
    with first.engine.hooked("embed", lambda y, tokens, weight: calls.append(len(tokens))):
        again = second.generate([5, 6, 7], max_tokens=3, keep_logits=True)
        assert calls[0] == 1  # of the prompt's three tokens only the last
        second.forget()
        calls.clear()
        once_more = second.generate([5, 6, 7], max_tokens=3)
        assert calls[0] == 3
    assert answer.tokens == again.tokens == once_more.tokens
