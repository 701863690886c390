"""What a fault is: one historical bug, by name, at the one place where it really happened.

A fault is a small function that turns something healthy into something broken: a seam of the converter, a finished
file, the block decoders, an engine's primitive, the config, the tokenizer, an instrument. Healthy code knows nothing
of it. Many bugs exist in two places, as a file that was written wrongly or as a reader that computes wrongly; such
a fault has two functions that mean the same: its file form and its run form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from aprlab.conversion.seams import Seams
from aprlab.engines.base import Engine
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.model import Model
from aprlab.quants.base import Quant
from aprlab.quants.types import TensorType

Layer = Literal[
    "container", "naming", "dtype", "layout", "decode", "weights", "config", "tokenizer", "forward", "instrument"
]  # fmt: skip
LAYERS: tuple[str, ...] = get_args(Layer)
SECTIONS = {
    "A": "Naming",
    "B": "Dtype",
    "C": "Span, shape and layout",
    "D": "Block decoding",
    "E": "Forward pass",
    "F": "Tokenizer, template, stopping",
    "G": "Faulty instruments",
}
FILE_SEAMS = ("seams", "post")
RUN_SEAMS = ("registry", "engine", "config", "tokenizer", "prompt", "session")
Registry = Mapping[TensorType, Quant]


@dataclass(frozen=True)
class Fault:
    """One historical bug.

    Attributes:
        id: the ticket's number where there is one (``GH-191``), else a descriptive name (``lost-qkv-biases``).
        title: one line.
        layer: the layer `peel` has to blame.
        section: the section of the catalogue, a key of `SECTIONS`.
        story: three lines: what was done, why it was wrong, how it hid.
        mark: what it leaves behind, and where.
        silent: a short greedy answer of a real model stays right, word for word; only logits, files or long contexts
            show it. Measured on Qwen2.5-Coder 0.5B; a model with narrower margins may differ.
        seams, post: the file form: the converter's decisions, or an edit of the finished file (in place, by path).
        registry, engine, config, tokenizer, prompt, session: the run form: block decoders, an engine's primitives, the
            numbers of the forward pass, the tokenizer's data, its work (encoding, printing, stopping), or the loop that
            feeds the model.
        instrument, replaces: a faulty instrument, and which of `REPLACEABLE` it replaces.
        needs: what a model must have for the fault to change anything, in words; '' where every Qwen2 has it.
        given: options of `convert` that give a Q4_K_M model what it `needs`.
        fits: whether a model has it; asked only of run forms, a conversion sees for itself.
    """

    id: str
    title: str
    layer: Layer
    section: str
    story: str
    mark: str
    silent: bool = False
    seams: Callable[[Seams], Seams] | None = None
    post: Callable[[Path], None] | None = None
    registry: Callable[[Registry], Registry] | None = None
    engine: Callable[[Engine], Engine] | None = None
    config: Callable[[ModelConfig], ModelConfig] | None = None
    tokenizer: Callable[[TokenizerData], TokenizerData] | None = None
    prompt: Callable[[Qwen2Tokenizer], Qwen2Tokenizer] | None = None
    session: type[Session] | None = None
    instrument: Callable[..., Any] | None = None
    replaces: str = ""
    needs: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)
    fits: Callable[[Model], bool] = field(default=lambda model: True, repr=False)

    def __post_init__(self) -> None:
        files, runs = self._set(FILE_SEAMS), self._set(RUN_SEAMS)
        lies = self.instrument is not None
        if len(files) > 1 or len(runs) > 1 or bool(files or runs) == lies or bool(self.replaces) != lies:
            raise TypeError(f"fault {self.id}: one file form and one run form at most, or one instrument")
        if self.layer not in LAYERS or self.section not in SECTIONS:
            raise TypeError(f"fault {self.id}: unknown layer {self.layer!r} or section {self.section!r}")
        if not self.mark or len(self.story.splitlines()) != 3:
            raise TypeError(f"fault {self.id}: a story of three lines and a mark are needed")

    def _set(self, seams: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in seams if getattr(self, name) is not None)

    @property
    def file_seam(self) -> str | None:
        """Name of the attribute that holds the file form, or None."""
        return next(iter(self._set(FILE_SEAMS)), None)

    @property
    def run_seam(self) -> str | None:
        """Name of the attribute that holds the run form, or None."""
        return next(iter(self._set(RUN_SEAMS)), None)

    def to_json(self) -> dict[str, Any]:
        """Everything but the functions, as plain data."""
        forms = {"file": self.file_seam, "run": self.run_seam, "instrument": self.replaces or None}
        plain = {name: getattr(self, name) for name in ("id", "title", "layer", "section", "story", "mark", "silent", "needs")}
        return plain | {"given": dict(self.given), "seams": {form: seam for form, seam in forms.items() if seam}}


def lines(*three: str) -> str:
    """A story: one string a line."""
    return "\n".join(three)
