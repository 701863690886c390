"""Files as people have them: each opens and answers as it should, or is refused in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import typed, variant

from aprlab.errors import AprlabError
from aprlab.formats import gguf, open_model
from aprlab.formats.unusual import unusual
from aprlab.inference import Session
from aprlab.inference.template import render
from aprlab.published import ANSWER, QUESTION

MACROS = (
    "{%- macro line(role, text) -%}<|im_start|>{{ role }}\n{{ text }}<|im_end|>\n{% endmacro -%}"
    "{%- if tools -%}{{ line('system', tools | tojson) }}{%- endif -%}"
    "{%- for m in messages -%}{{ line(m.role, m.content) }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)


def field(kind: str) -> Callable[[str, Any], gguf.Field]:
    return lambda key, value: gguf.field_of(key, kind, value)


def added(tokens: int, rows: int) -> Callable[[Path, Path], Path]:
    """So many tokens more, and so many rows, as a fine-tune with its own marks has them."""

    def make(source: Path, out: Path) -> Path:
        model = open_model(source)
        data = model.tokenizer
        names = data.tokens + [f"<|mine_{n}|>" for n in range(tokens)]
        keys = {
            "tokenizer.ggml.tokens": names,
            "tokenizer.ggml.token_type": typed("tokenizer.ggml.token_type", [*map(int, data.token_types), *[3] * tokens]),
        }
        grown = {}
        for name in ("token_embd.weight", "output.weight"):
            if (old := model.tensors.get(name)) is not None:
                raw = np.concatenate([old.raw, np.tile(old.blocks()[0], rows)])
                grown[name] = old.replace(shape=(old.shape[0] + rows, old.cols), raw=raw)
        return variant(source, out, keys=keys, tensors=grown)

    return make


def with_keys(**keys: Any) -> Callable[[Path, Path], Path]:
    plain = {key.replace("__", "."): value for key, value in keys.items()}
    made = {key: value[0](key, value[1]) if isinstance(value, tuple) else value for key, value in plain.items()}
    return lambda source, out: variant(source, out, keys=made)


# what -> the file, and what becomes of it: nothing, what `inspect` says, or the code of a refusal
FILES: dict[str, tuple[Callable[[Path, Path], Path], str | None]] = {
    "alignment 256": (lambda a, b: variant(a, b, alignment=256), "unusual.alignment"),
    "another order of keys and tensors": (lambda a, b: variant(a, b, reverse=True), None),
    "an array without entries": (with_keys(general__tags=(field("array[string]"), [])), "unusual.empty-array"),
    "a key of nobody's": (with_keys(acme__note="hello"), None),
    "an unknown key of the architecture": (with_keys(qwen2__attention__magic=1), "keys.not-handled"),
    "a 64-bit number": (with_keys(qwen2__block_count=(field("uint64"), 1)), "gguf.wrong-value-type"),
    "a number with a sign": (with_keys(qwen2__context_length=(field("int32"), 512)), "gguf.wrong-value-type"),
    "a float of 64 bits": (with_keys(qwen2__rope__freq_base=(field("float64"), 1e6)), "gguf.wrong-value-type"),
    "no tokenizer.ggml.pre": (lambda a, b: variant(a, b, drop=("tokenizer.ggml.pre",)), "gguf.missing-key"),
    "added tokens": (added(2, 2), None),
    "added tokens and padding rows": (added(2, 9), "gguf.tokens-and-rows"),
    "tokens without rows": (added(2, 0), "gguf.tokens-and-rows"),
    "a template with macros": (with_keys(tokenizer__chat_template=MACROS), None),
    "a linear scaling of 1": (with_keys(qwen2__rope__scaling__type="none"), None),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_it_opens_and_answers_or_is_refused_in_one_line(what: str, tiny: Path, tmp_path: Path) -> None:
    make, expected = FILES[what]
    path = make(tiny, tmp_path / "m.gguf")
    usual = {one.code for one in unusual(open_model(tiny))}
    try:
        model = open_model(path)
        found = {one.code for one in unusual(model)} - usual
        session = Session(model)
        if what == "a template with macros":
            assert session.chat_tokens(QUESTION) == session.tokenizer.encode(
                f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
            )
        else:
            assert session.generate(QUESTION, max_tokens=16).text == ANSWER
    except AprlabError as error:
        assert error.code == expected and "\n" not in str(error), (error.code, str(error))
    else:
        assert found == ({expected} if expected else set())


def test_tools_reach_a_template_with_macros() -> None:
    said = render(MACROS, [{"role": "user", "content": "Hi"}], tools=[{"name": "weather"}])
    assert said.startswith('<|im_start|>system\n[{"name": "weather"}]<|im_end|>\n<|im_start|>user\nHi')


def test_a_head_written_out_is_the_tied_embedding(tiny: Path, tmp_path: Path) -> None:
    embedding = open_model(tiny).tensor("token_embd.weight")
    tied = variant(tiny, tmp_path / "tied.gguf", tensors={"output.weight": None})
    both = variant(tiny, tmp_path / "both.gguf", tensors={"output.weight": embedding.replace(name="output.weight")})
    assert open_model(tied).config.tied_embeddings and not open_model(both).config.tied_embeddings
    answers = [Session(open_model(path)).generate(QUESTION, max_tokens=4, keep_logits=True) for path in (tied, both)]
    assert answers[0].tokens == answers[1].tokens and "unusual.tied" in {one.code for one in unusual(open_model(tied))}
