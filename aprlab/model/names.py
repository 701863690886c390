"""Tensor names: GGUF's are the ones used inside, APR's and Hugging Face's are a declared bijection away.

`PAIRS` has every tensor of every architecture in `aprlab.model.architecture`; `N` is the layer. The historic variants of APR's
names are data too, so that files written with them can be recognised, repaired or made on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

from aprlab.model.architecture import ARCHITECTURES, architecture_of
from aprlab.model.rope import FACTORS

# GGUF name, Hugging Face and APR canonical name: what any architecture has. Each has one name, whoever uses it.
PAIRS: tuple[tuple[str, str], ...] = (
    *dict.fromkeys((gguf, hf) for known in ARCHITECTURES.values() for gguf, hf, _ in known.rows),
    (FACTORS, FACTORS),  # Hugging Face has numbers in config.json in its place
)

# Names that are remembered: searches ask for those of a file again and again, and 10,000 layers have 120,000.
_KNOWN = 1 << 17
_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")


@lru_cache(_KNOWN)
def _template(name: str) -> tuple[str, str]:
    """`blk.7.attn_q.weight` -> (`blk.N.attn_q.weight`, `7`); a name without a layer gives (name, '')."""
    found = _NUMBER.search(name)
    return (name, "") if found is None else (name[: found.start()] + "N" + name[found.end() :], found.group())


def template_of(name: str) -> str:
    """The GGUF name with its layer number replaced by ``N``."""
    return _template(name)[0]


def layer_of(name: str) -> str:
    """The layer number in a name, ``""`` where it has none."""
    return _template(name)[1]


def _short(hf: str) -> str:
    """The third historic form: `N.q_proj.weight`, i.e. the layer number and the last module alone."""
    parts = hf.split(".")
    return ".".join(["N", *parts[-2:]]) if "N" in parts else ".".join(parts[-2:])


# Every naming a file was ever written with: naming -> {template in the file: GGUF template}.
VARIANTS: dict[str, dict[str, str]] = {
    "canonical": {hf: gguf for gguf, hf in PAIRS},  # PMAT-113, and PMAT-222 up to today
    "bare": {hf.removeprefix("model."): gguf for gguf, hf in PAIRS},  # PMAT-205, the first fix of GH-190
    "short": {_short(hf): gguf for gguf, hf in PAIRS},  # from one upstream contract
    "raw": {gguf: gguf for gguf, _ in PAIRS},  # realizar keeps GGUF's names
}
_WRITE: dict[str, dict[str, str]] = {naming: {g: f for f, g in table.items()} for naming, table in VARIANTS.items()}
assert all(len(table) == len(PAIRS) == len(_WRITE[naming]) for naming, table in VARIANTS.items())


@lru_cache(_KNOWN)
def from_gguf(name: str, naming: str = "canonical") -> str:
    """GGUF name -> name in an APR file of that `naming`; a name outside the table stays as it is."""
    template, layer = _template(name)
    other = _WRITE[naming].get(template)
    return name if other is None or _literal(other, layer) else _fill(other, layer)


@lru_cache(1 << 14)
def to_gguf(name: str, naming: str = "canonical") -> str | None:
    """Name in an APR file of that `naming` -> GGUF name, or None where the table does not know it."""
    template, layer = _template(f".{name}") if naming == "short" else _template(name)
    gguf = VARIANTS[naming].get(template.removeprefix("."))
    return None if gguf is None or _literal(gguf, layer) else _fill(gguf, layer)


def _literal(template: str, layer: str) -> bool:
    """Whether a name was no instance of its template but the template itself, ``N`` and all."""
    return not layer and "N" in template.split(".")


def _fill(template: str, layer: str) -> str:
    return re.sub(r"(?:(?<=\.)|^)N(?=\.)", layer, template)


@lru_cache(_KNOWN)
def namings_of(name: str) -> Mapping[str, str]:
    """Every naming that knows `name`, with the GGUF name it stands for there."""
    return {naming: gguf for naming in VARIANTS if (gguf := to_gguf(name, naming)) is not None}


def inventory(layers: int, *, separate_output: bool = True, architecture: str = "qwen2") -> Iterator[str]:
    """GGUF names of a whole model of this architecture; a Qwen2 has 12 a layer and 2 or 3 global ones."""
    for gguf, _, _ in architecture_of(architecture).rows:
        if "N" in gguf.split("."):
            yield from (_fill(gguf, str(n)) for n in range(layers))
        elif separate_output or gguf != "output.weight":
            yield gguf
