"""What a program is allowed to round, declared: two runs under unlike contracts differ, and that is no fault.

A contract is written as one line, ``q8, cache f16, flash``; that line is what a trace point carries and what two points must
have in common to be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from aprlab.errors import UsageError

FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class Contract:
    """Roundings that belong to a program and are no fault of it.

    Attributes:
        activations: what a product does to its activations: ``f32`` keeps them; ``q8`` rounds them as ggml does for the
            type of each weight (8 bits by blocks of 32 or 256; half precision for F16 and BF16; F32 not at all);
            ``f16`` and ``bf16`` round them to that type whatever the weight is.
        cache: type in which keys and values are kept.
        flash: attention is one operation with a running softmax, and its sums may be kept in the cache's type.
        values: type of every value between two operations; also of the weights, where it is not ``f32``.
    """

    activations: str = "f32"
    cache: str = "f32"
    flash: bool = False
    values: str = "f32"

    def __post_init__(self) -> None:
        allowed = {"activations": (*FLOATS, "q8"), "cache": FLOATS, "values": FLOATS}
        for name, known in allowed.items():
            if getattr(self, name) not in known:
                said = f"contract: {name} {getattr(self, name)!r}; known: {', '.join(known)}"
                raise UsageError(said, code="engines.unknown-contract")

    def __str__(self) -> str:
        parts = [self.activations]
        parts += [f"{name} {getattr(self, name)}" for name in ("cache", "values") if getattr(self, name) != "f32"]
        return ", ".join([*parts, *(["flash"] if self.flash else [])])

    @classmethod
    def parse(cls, text: str) -> Contract:
        """The inverse of `str`; raises UsageError for words that it does not know."""
        first, *rest = (part.strip() for part in text.split(","))
        given: dict[str, str | bool] = {"activations": first}
        for part in rest:
            name, _, value = part.partition(" ")
            if name not in {f.name for f in fields(cls)} or name in given or bool(value) == (name == "flash"):
                said = f"contract {text!r}: {part!r} is unknown; an example: 'q8, cache f16, flash'"
                raise UsageError(said, code="engines.unknown-contract")
            given[name] = value or True
        return cls(**given)  # type: ignore[arg-type]  # checked by __post_init__
