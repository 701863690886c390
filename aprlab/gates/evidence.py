"""Reference and candidate: what gates look at, measured once.

Whatever is measured is measured by a function that the caller hands over, and kept under it: two sets of instruments
never share a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.conversion.converter import convert, export
from aprlab.engines import AUTO, choose
from aprlab.errors import AprlabError
from aprlab.formats import open_model
from aprlab.formats.identity import file_only
from aprlab.formats.leftovers import temporary_folder
from aprlab.formats.raw import Piece, Seen, content_hash, look
from aprlab.inference.session import Generation, Session
from aprlab.instruments.self_test import InstrumentResult, InstrumentSet
from aprlab.model.content import drop_pages
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.onion.decode_counts import decodings
from aprlab.published import QUESTION
from aprlab.quants import types

Measure = Callable[..., Any]


class ReferenceSide:
    """The reference: a model, its session, its answers; everything is computed once, when first asked for."""

    def __init__(
        self,
        model: Model,
        session: Session | None,
        engine: str | None,
        prompts: Sequence[str],
        max_tokens: int,
        threads: int | None = None,
    ) -> None:
        self.model, self.threads = model, threads
        if session is not None and engine in (None, "", AUTO):
            engine = session.engine.spec
        self.engine = choose(engine, model, threads=threads)  # the candidate's, too: it is not chosen again
        self.prompts, self.max_tokens = tuple(prompts), max_tokens
        self._session = session
        self._values: dict[tuple[Measure, str], Any] = {}
        self._blocks: dict[tuple[Measure, str], Any] = {}

    @cached_property
    def session(self) -> Session:
        return self._session if self._session is not None else Session(self.model, engine=self.engine, threads=self.threads)

    @property
    def raw(self) -> bool:
        """Both sides are given texts as they are, since this one has no chat template."""
        return self.session.wants_raw

    @cached_property
    def answers(self) -> list[Generation]:
        return [self.session.generate(p, max_tokens=self.max_tokens, raw=self.raw, keep_logits=True) for p in self.prompts]

    @cached_property
    def work(self) -> int:
        return decodes(self.session, self.raw)

    def of_blocks(self, measure: Measure, name: str) -> Any:
        """What `measure` says of a tensor's raw bytes, ``uint8 (n,)``."""
        if (measure, name) not in self._blocks:
            self._blocks[measure, name] = measure(raw := self.model.tensors[name].raw)
            drop_pages(raw)
        return self._blocks[measure, name]

    def of_values(self, measure: Measure, name: str) -> Any:
        """What `measure` says of a tensor's decoded values, float32 in the tensor's shape."""
        if (measure, name) not in self._values:
            self._values[measure, name] = measure(self.model.tensors[name].dequantise())
        return self._values[measure, name]

    @cached_property
    def by_content(self) -> dict[tuple[int, int], Tensor]:
        """The tensor that has some bytes, by their length and hash."""
        return {self.of_blocks(content_hash, name): tensor for name, tensor in self.model.tensors.items()}


class CandidateFile:
    """The candidate: a file as written (`seen`), and as the strict reader reads it (`model`, which may raise)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._measured: dict[Measure, Any] = {}

    @cached_property
    def seen(self) -> Seen:
        return look(self.path)

    @cached_property
    def model(self) -> Model:
        model = open_model(self.path)
        if file_only(model) is None:
            _ = model.config, model.tokenizer  # made when first asked for, and refused there
        return model

    def of_file(self, measure: Measure) -> Any:
        """What `measure` says of the file's path."""
        if measure not in self._measured:
            self._measured[measure] = measure(self.path)
        return self._measured[measure]

    @property
    def naming(self) -> str:
        """The naming that the file's dialect has."""
        return self.seen.dialect.naming if self.seen.format == "apr" and self.seen.unrun is None else "raw"

    @cached_property
    def named(self) -> dict[str, Piece]:
        """Pieces by the GGUF name that theirs stands for in the file's own naming."""
        return {p.stated: p for p in self.seen.pieces if p.stated is not None and p.naming == self.naming}

    @cached_property
    def back(self) -> Model:
        """The file converted again and opened: into GGUF, or, for types that GGUF lacks, into APR's other dialect."""
        with temporary_folder() as folder:  # the mapping outlives the name
            if self.model.format == "gguf":
                convert(self.model, folder / "back.apr")
                return open_model(folder / "back.apr")
            if any(t.type in (types.APR_Q4, types.APR_Q8) for t in self.model.tensors.values()):
                other = "realizar" if self.model.dialect.startswith("aprender") else "aprender"
                convert(self.model, folder / "back.apr", dialect=other)
                return open_model(folder / "back.apr")
            export(self.model, folder / "back.gguf")
            return open_model(folder / "back.gguf")


class RefusedCandidate(CandidateFile):
    """A sound file that a faulty reader refuses."""

    def __init__(self, path: Path, error: AprlabError) -> None:
        super().__init__(path)
        self.error = error

    @property
    def model(self) -> Model:
        raise self.error


@dataclass(eq=False)
class GateCase:
    """A reference and a candidate, and what they are measured with.

    Attributes:
        ref: the reference.
        file: the candidate's file.
        given: a session over that file (one with faults, say) to be asked instead of its own.
        origin: what the reference was re-encoded from, where that was meant: F-ROSETTA-STATS-001 looks at it instead.
        instruments: what is measured with.
        tested: the self-test of those instruments, if it is already known.
    """

    ref: ReferenceSide
    file: CandidateFile
    given: Session | None = None
    origin: ReferenceSide | None = None
    instruments: InstrumentSet = field(default_factory=InstrumentSet)
    tested: list[InstrumentResult] | None = None

    def __post_init__(self) -> None:
        self._values: dict[tuple[Measure, str], Any] = {}

    @cached_property
    def session(self) -> Session:
        if self.given is not None:
            return self.given
        return Session(self.file.model, engine=self.ref.engine, threads=self.ref.threads)

    @cached_property
    def answers(self) -> list[Generation]:
        ref = self.ref
        if self.given is ref.session:
            return ref.answers
        return [self.session.generate(p, max_tokens=ref.max_tokens, raw=ref.raw, keep_logits=True) for p in ref.prompts]

    @cached_property
    def unrun(self) -> AprlabError | None:
        """Why the reference cannot be run although its file is sound; None for Qwen2."""
        return file_only(self.ref.model)

    @property
    def source(self) -> ReferenceSide:
        """What a gate with a tolerance for types compares the candidate with."""
        return self.ref if self.origin is None else self.origin

    @cached_property
    def selftest(self) -> list[InstrumentResult]:
        return self.instruments.selftest() if self.tested is None else self.tested

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The candidate's tensors, with the decoders of the candidate session."""
        return self.session.engine.model.tensors if self.given is not None else self.file.model.tensors

    def of_values(self, measure: Measure, name: str) -> Any:
        """What `measure` says of a tensor's values as the candidate's reader decodes them."""
        if (measure, name) not in self._values:
            alike = name in self._alike  # the same blocks, the same decoder
            values = self.ref.of_values(measure, name) if alike else measure(self.tensors[name].dequantise())
            self._values[measure, name] = values
        return self._values[measure, name]

    @cached_property
    def _alike(self) -> set[str]:
        """Tensors that are the reference's, block for block, and are decoded as the reference's are."""
        found = set()
        for name, tensor in self.tensors.items():
            of = self.ref.model.tensors.get(name)
            if of is None or not tensor.content.as_stored or tensor.type is not of.type or tensor.shape != of.shape:
                continue
            if np.array_equal(tensor.raw, of.raw):
                found.add(name)
        return found


def decodes(session: Session, raw: bool = False) -> int:
    """How many times a warm pass of one token decodes a tensor's blocks."""
    return sum(decodings(session.engine, session.config, session.prompt_tokens(QUESTION, raw=raw)[0]).values())


def as_bytes(value: Any) -> np.ndarray:
    """Any plain value (text, number, list of such) as bytes that instruments compare: ``uint8 (n,)``, never empty."""
    return np.frombuffer(repr(_plain(value)).encode("utf-8", "surrogatepass"), np.uint8)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
