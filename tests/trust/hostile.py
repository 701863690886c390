"""Model files that are sound but for one hostile thing, small: a random model of one layer with a vocabulary of bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from builders import CONFIG, TEMPLATE  # noqa: E402
from made import bpe_data, made_model, write_gguf  # noqa: E402

from aprlab.conversion.converter import convert  # noqa: E402
from aprlab.model.model import Model  # noqa: E402

ESCAPES = "\x1b]0;PWNED\x07\x1b[2J\x1b[31m\x9b\u202e\r"  # OSC, CSI, C1, a mark of direction, a return to the line's start
MARKUP = "[bold]$$x=1$$[/]<b>&"


def _keys(drop: tuple[str, ...] = (), **keys: object) -> Callable[[Path], Path]:
    return lambda path: write_gguf(_model(), path, drop, **keys)


def _model(**changes: object) -> Model:
    data = bpe_data("qwen2")
    return made_model(replace(CONFIG, block_count=1), replace(data, **changes))  # type: ignore[arg-type]


def _tokens(text: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        model = _model()
        tokens = list(model.tokenizer.tokens)
        tokens[100:200] = [f"{text}{n}" for n in range(100, 200)]
        return write_gguf(replace(model, make_tokenizer=lambda: replace(model.tokenizer, tokens=tokens)), path)

    return make


def _renamed(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        model = _model()
        tensors = {name if n == "blk.0.ffn_up.weight" else n: t for n, t in model.tensors.items()}
        return write_gguf(replace(model, tensors=tensors), path)

    return make


def _apr(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        source = write_gguf(_model(), path.with_suffix(".tmp"))
        convert(source, path)
        source.unlink()
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


FILES: dict[str, Callable[[Path], Path]] = {
    "name-escapes.gguf": _renamed(f"x{ESCAPES}"),
    "name-markup.gguf": _renamed(f"x{MARKUP}"),
    "tokens-escapes.gguf": _tokens(ESCAPES),
    "tokens-markup.gguf": _tokens(MARKUP),
    "title-escapes.gguf": _keys(general__name=ESCAPES + MARKUP),
    "template-escapes.gguf": lambda path: write_gguf(
        _model(chat_template=TEMPLATE + "{{ raise_exception('" + ESCAPES + "') }}"), path
    ),
    "nan-epsilon.gguf": _keys(qwen2__attention__layer_norm_rms_epsilon=float("nan")),
    "nan-key.gguf": _keys(general__odd=float("inf")),
    "no-heads.gguf": _keys(("qwen2.attention.head_count",)),
    "layers-text.gguf": _keys(qwen2__block_count="many"),
    "no-epsilon.gguf": _keys(qwen2__attention__layer_norm_rms_epsilon=0.0),
    "cut.apr": _apr(lambda data: data[: len(data) // 2]),
    "magic.apr": lambda path: (path.write_bytes(b"APR\0" + bytes(40)), path)[1],
    "nothing.gguf": lambda path: (path.write_bytes(b""), path)[1],
    "[bold]\x1b[31m.gguf": _keys(),
}


def make(folder: Path) -> list[Path]:
    """All of them, in a folder."""
    return [write(folder / name) for name, write in FILES.items()]
