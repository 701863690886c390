"""What faults do to the words: loud ones change the answer, silent ones leave it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_runs import QUESTION, answer

from aprlab.errors import NumericError, UsageError
from aprlab.faults import FAULTS, session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.model import Model


def test_prompts_go_wrong_as_described(model: Model) -> None:
    session = session_with(model, [])
    right = session.prompt_tokens(QUESTION)
    control = {id for id, kind in enumerate(model.tokenizer.token_types) if kind == 3}

    def ids(fault: str) -> list[int]:
        return session_with(model, [fault]).prompt_tokens(QUESTION)

    text = session.tokenizer.decode(right)
    assert len(ids("no-merges")) == sum(
        1 if id in control else len(session.tokenizer.token_bytes(id)) for id in right
    )  # one id a byte, but for the specials
    for fault in ("split-specials", "specials-untyped"):
        assert not control & set(ids(fault))
        assert session.tokenizer.decode(ids(fault)) == text
    assert session.tokenizer.decode(ids("template-skipped")) == QUESTION
    doubled = session.tokenizer.decode(ids("template-doubled"))
    once = session.tokenizer.decode(right)
    assert once in doubled
    assert sum(id in control for id in ids("template-doubled")) > 1.5 * sum(id in control for id in right)
    plain = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert session.tokenizer.decode(ids("template-hard-coded")) == plain
    with pytest.raises(UsageError, match="no chat template"):
        ids("template-lost")


def test_gpt2_cuts_words_otherwise(model: Model) -> None:
    right, wrong = session_with(model, []).tokenizer, session_with(model, ["wrong-pre-tokeniser"]).tokenizer

    def words(tokenizer: Qwen2Tokenizer) -> list[str]:
        return [word for word, _ in tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str("is 12):\n")]

    assert words(right) == ["is", "Ġ", "1", "2", "):Ċ"]
    assert words(wrong) == ["is", "Ġ12", "):", "Ċ"]
    assert right.encode("hello world") == wrong.encode("hello world")
    assert right.decode(wrong.encode("is 12):\n")) == "is 12):\n"


def test_a_foreign_vocabulary_agrees_with_itself_alone(model: Model) -> None:
    """Text comes back whole, through other ids; special tokens and single bytes stay, the model's own words do not."""
    right, wrong = session_with(model, []), session_with(model, ["foreign-tokenizer"])
    ids, foreign = right.prompt_tokens(QUESTION), wrong.prompt_tokens(QUESTION)
    assert foreign != ids
    assert len(foreign) == len(ids)
    assert wrong.tokenizer.decode(foreign) == right.tokenizer.decode(ids)
    control = {id for id, kind in enumerate(model.tokenizer.token_types) if kind == 3}
    assert [id for id in foreign if id in control] == [id for id in ids if id in control]
    assert sorted(wrong.tokenizer.data.tokens) == sorted(model.tokenizer.tokens)
    assert wrong.generate(QUESTION, max_tokens=8).text != right.generate(QUESTION, max_tokens=8).text


def test_spelled_tokens_are_the_same_tokens(model: Model) -> None:
    right = session_with(model, []).generate(QUESTION, max_tokens=12)
    wrong = session_with(model, ["byte-level-text"]).generate(QUESTION, max_tokens=12)
    assert wrong.tokens == right.tokens
    assert wrong.text == "".join(model.tokenizer.tokens[id] for id in right.tokens) != right.text


def test_the_end_of_the_answer_is_ignored(model: Model) -> None:
    right = session_with(model, []).generate(QUESTION, max_tokens=24)
    wrong = session_with(model, ["eos-hard-coded"]).generate(QUESTION, max_tokens=24)
    assert right.stop == "eos"
    assert wrong.tokens[: len(right.tokens)] == right.tokens
    assert wrong.tokens[len(right.tokens)] == model.tokenizer.eos_token_id
    assert len(wrong.tokens) > len(right.tokens)


# Answers that no model, however small, keeps under these; and those that every engine within its contract keeps.
LOUD = (
    "lost-qkv-biases", "swapped-k-v", "tied-lm-head", "zero-lm-head", "GH-202", "transposed-embedding", "permuted-qk",
    "q4k-min-lost", "q4k-d-dmin", "q4k-scales-plain", "q4k-nibble-pairs", "q4k-nibbles-exchanged", "q4k-16-bytes",
    "scales-flushed", "rope-norm", "gqa-modulo", "head-dim-guessed", "kv-empty", "argmax-nan",
)  # fmt: skip
QUIET = ("cache-key-mismatch", "default-dequantise", "q8-activations", "prefill-decode", "wrong-eps")


@pytest.fixture(scope="module")
def right_tokens(model: Model) -> list[int]:
    return session_with(model, []).generate(QUESTION, max_tokens=8).tokens


def tokens_of(id: str, model: Model, broken: Callable[[str], Path]) -> list[int]:
    session = session_with(model, [id]) if FAULTS[id].run_seam is not None else Session(open_model(broken(id)))
    return session.generate(QUESTION, max_tokens=8).tokens


@pytest.mark.parametrize("id", sorted(LOUD))
def test_loud_faults_change_the_answer(id: str, model: Model, broken: Callable[[str], Path], right_tokens: list[int]) -> None:
    assert not FAULTS[id].silent
    assert tokens_of(id, model, broken) != right_tokens


@pytest.mark.parametrize("id", sorted(QUIET))
def test_silent_faults_leave_the_answer(id: str, model: Model, broken: Callable[[str], Path], right_tokens: list[int]) -> None:
    assert FAULTS[id].silent
    assert tokens_of(id, model, broken) == right_tokens


def test_a_type_read_by_the_wrong_kernel_ends_in_nan(model: Model) -> None:
    with pytest.raises(NumericError, match=r"step 0: .* NaN"):
        answer(session_with(model, ["default-kernel"]))


@pytest.mark.real
def test_silence_on_the_real_model(real_05b: Path) -> None:
    """`silent` is a claim about real models: held on the 0.5B for those that a small model does not settle."""
    pytest.importorskip("aprlab.engines.jit")
    chosen = ("rope-theta", "zeroed-norm", "template-doubled", "rope-norm", "kv-stale")
    with open_model(real_05b) as model:
        healthy = session_with(model, [], engine="jit")
        right = healthy.generate(QUESTION, max_tokens=9).text
        kept = {id: session_with(healthy, [id]).generate(QUESTION, max_tokens=9).text == right for id in chosen}
        healthy.engine.close()
    assert kept == {id: FAULTS[id].silent for id in chosen}
    assert sorted(kept.values()) == [False, False, True, True, True]
