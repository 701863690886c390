"""A model as aprlab sees it: config, tokenizer data and tensors, whichever container they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from aprlab.errors import FormatError

if TYPE_CHECKING:
    from types import TracebackType
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.tensor import Tensor


@dataclass(frozen=True, slots=True)
class TokenizerReader:
    """A model's `make_tokenizer` whose file has more to read than everybody needs.

    Attributes:
        whole: reads everything.
        glance: checks the same and raises the same, but `tokens` and `merges` stay in the file: sequences, no lists.
    """

    whole: Callable[[], TokenizerData]
    glance: Callable[[], TokenizerData]

    def __call__(self) -> TokenizerData:
        return self.whole()


@dataclass(eq=False)
class Model:
    """An opened model file. `open_model(path)` finds the format by magic and checks everything but the values.

    `config` and `tokenizer` are made when first asked for, so that a file that lacks one of them can still be looked at.
    """

    path: Path  # of the file, or of a Hugging Face directory
    format: str  # "gguf", "apr" or "safetensors"
    dialect: str  # "gguf v3", "aprender", "aprender (no footer)", "realizar", "hugging face", "hugging face in 3 shards"
    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any]
    make_config: Callable[[], ModelConfig] = field(repr=False)
    make_tokenizer: Callable[[], TokenizerData] = field(repr=False)
    warnings: list[str] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config; raises FormatError naming the key where one is missing."""
        return self.make_config()

    @cached_property
    def tokenizer(self) -> TokenizerData:
        """The model's tokenizer data; raises FormatError naming the key where one is missing."""
        return self.make_tokenizer()

    def tokenizer_glance(self) -> TokenizerData:
        """`tokenizer`, for who counts its tokens and merges: these may still be in the file, and are read where asked for."""
        make = self.make_tokenizer
        return make.glance() if isinstance(make, TokenizerReader) and "tokenizer" not in vars(self) else self.tokenizer

    def tensor(self, name: str) -> Tensor:
        """The tensor with this GGUF name; raises FormatError where the file has none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise FormatError(f"has no tensor {name!r}", code="model.missing-tensor", path=self.path) from None

    def with_changes(
        self,
        *,
        tensors: dict[str, Tensor] | None = None,
        config: ModelConfig | None = None,
        tokenizer: TokenizerData | None = None,
    ) -> Model:
        """A model with other tensors, another config or other tokenizer data; the rest is shared with this one."""
        return replace(
            self,
            tensors=self.tensors if tensors is None else tensors,
            make_config=lambda: self.config if config is None else config,
            make_tokenizer=lambda: self.tokenizer if tokenizer is None else tokenizer,
        )

    def in_common(self, other: Model) -> frozenset[str]:
        """Names of the tensors that are the same in both: type, shape, every byte (compared, unless both have one place).

        Tensors whose bytes are made on demand, or read from afar, are not looked at.
        """
        found = set()
        for name, mine in self.tensors.items():
            theirs = other.tensors.get(name)
            if theirs is None or mine.type is not theirs.type or mine.shape != theirs.shape:
                continue
            plain = all(t.at_hand and t.content.as_stored for t in (mine, theirs))
            if plain and (mine.same_memory(theirs) or mine.same_bytes(theirs)):
                found.add(name)
        return frozenset(found)

    def check_values(self) -> None:
        """Raise FormatError for the first tensor with a scale that is NaN or infinite. Reads every block's scale."""
        for tensor in self.tensors.values():
            tensor.check_values()

    def by_type(self) -> dict[str, int]:
        """Number of tensors by type name, largest first."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.type.name] = counts.get(tensor.type.name, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def quantised(self) -> int:
        """Number of quantised tensors."""
        return sum(t.type.quantised for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def load_line(self) -> str:
        """The line the ticket made famous, but true: it counts tensors, not uploads."""
        layers = self.config.block_count
        floats = [name for name in ("F32", "F16", "BF16", "F64") if name in self.by_type()]
        rest = ", ".join(f"{self.by_type()[name]} {name}" for name in floats) or "0 float"
        return f"{layers} layers, {self.quantised} quantised, {rest} tensors, {self.nbytes / 2**20:.0f} MB"

    def close(self) -> None:
        """Forget the tensors; the mapping goes when the last view on it does."""
        self.tensors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _repr_html_(self) -> str:
        from aprlab.display.html import model_page  # only a notebook asks
        from aprlab.model.description import describe

        return model_page(self.path, describe(self))

    def __repr__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.by_type().items())
        return f"Model({str(self.path)!r}, {self.format} ({self.dialect}), {len(self.tensors)} tensors: {types})"
