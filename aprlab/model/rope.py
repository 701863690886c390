"""Rotary scaling: how the rotary frequencies of a model differ from the plain ``theta**(-2i/D)``.

Linear scaling divides every position by a factor. YaRN does so for slow frequencies alone, leaves fast ones as they are, and
makes queries and keys a little longer. Llama 3's scaling is a tensor, `FACTORS`, that each frequency is divided by.

Sources: `ggml_rope_yarn` and `ggml_rope_yarn_corr_dims` of ggml, `modeling_rope_utils.py` of transformers, and
`llama-context.cpp`, which says what a missing key means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprlab.errors import FormatError, UnsupportedError

FACTORS = "rope_freqs.weight"  # GGUF name of the divisors, float32 (D/2,)
KINDS = ("linear", "yarn")


@dataclass(frozen=True, slots=True, repr=False)
class RopeScaling:
    """How frequencies are scaled.

    Attributes:
        kind: ``linear`` or ``yarn``.
        factor: by which the context became longer; at least 1.
        original_context: positions that the model was trained for before (yarn only; 0 else).
        attention_factor: what YaRN's own lengthening, ``0.1 ln(factor) + 1``, is multiplied by.
        beta_fast, beta_slow: turns within the original context, between which YaRN goes from one rule to the other.
    """

    kind: str
    factor: float
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __repr__(self) -> str:
        more = f" of {self.original_context} positions" if self.original_context else ""
        others = {
            "attention factor": (self.attention_factor, 1.0), "beta fast": (self.beta_fast, 32.0),
            "beta slow": (self.beta_slow, 1.0),
        }  # fmt: skip
        return f"{self.kind} by {self.factor:g}{more}" + "".join(
            f", {name} {value:g}" for name, (value, usual) in others.items() if value != usual
        )

    @property
    def length(self) -> float:
        """What rotated queries and keys are multiplied by."""
        return self.attention_factor * yarn_length(self.factor) if self.kind == "yarn" else 1.0


def yarn_length(factor: float) -> float:
    """YaRN's own lengthening of queries and keys."""
    return 0.1 * math.log(factor) + 1.0


def frequencies(
    theta: float, half: int, scaling: RopeScaling | None = None, factors: np.ndarray | None = None
) -> np.ndarray:
    """Angle of each pair at position 1.

    Args:
        theta: base.
        half: D/2, the number of pairs.
        scaling: None for plain frequencies.
        factors: float32 ``(D/2,)``, what each frequency is divided by; None for ones.

    Returns:
        float64 ``(D/2,)``.
    """
    plain = theta ** (-np.arange(half) / half)
    if factors is not None:
        plain = plain / factors.astype(np.float64)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    # YaRN: pairs below `first` turn often enough within the original context and stay, pairs above `last` are slowed down.
    first = max(0, math.floor(_pair_with_turns(scaling.beta_fast, theta, half, scaling.original_context)))
    last = min(2 * half - 1, math.ceil(_pair_with_turns(scaling.beta_slow, theta, half, scaling.original_context)))
    stays = 1 - np.clip((np.arange(half) - first) / max(0.001, last - first), 0, 1)
    return plain * (stays + (1 - stays) / scaling.factor)


def _pair_with_turns(turns: float, theta: float, half: int, context: int) -> float:
    """The pair, as a fraction, that turns so many times within `context` positions."""
    return half * math.log(context / (turns * 2 * math.pi)) / math.log(theta)


def check_scaling(scaling: RopeScaling, theta: float) -> None:
    """Raise FormatError where a number of it cannot be computed with."""
    numbers = (scaling.factor, scaling.attention_factor, scaling.beta_fast, scaling.beta_slow)
    sound = all(0 < number < 3.4e38 for number in numbers) and scaling.factor >= 1
    if scaling.kind == "yarn":
        sound = sound and 0 < scaling.original_context < 2**31 and scaling.beta_fast >= scaling.beta_slow
    if not sound or not theta > 1:
        raise FormatError(f"rotary scaling {scaling} is out of range", code="config.out-of-range")


# ── as a GGUF file says it ────────────────────────────────────────────────────────────────────────────────────────

# Behind the architecture's prefix: key -> GGUF type.
GGUF_KEYS: dict[str, str] = {
    "rope.scaling.type": "string", "rope.scaling.factor": "float32", "rope.scale_linear": "float32",
    "rope.scaling.attn_factor": "float32", "rope.scaling.original_context_length": "uint32",
    "rope.scaling.yarn_beta_fast": "float32", "rope.scaling.yarn_beta_slow": "float32",
}  # fmt: skip


def from_gguf(get: Callable[[str], Any], context_length: int) -> RopeScaling | None:
    """The scaling that the keys of a GGUF file say, with what llama.cpp assumes where one is missing.

    Args:
        get: value of a key of `GGUF_KEYS`, None where the file has it not.
        context_length: the original context where the file says none.

    Raises:
        UnsupportedError: a kind of scaling that is not handled, by name.
        FormatError: a value of a wrong kind, or out of range.
    """
    kind, factor = get("rope.scaling.type"), get("rope.scaling.factor")
    if factor is None:
        factor = get("rope.scale_linear")
    factor = 1.0 if factor is None else _number(factor, "factor") or 1.0  # zero, too, is llama.cpp's word for none
    kind = "linear" if kind is None else kind  # llama.cpp's default, which a factor alone gets
    if not isinstance(kind, str):
        raise FormatError(f"the kind of rotary scaling is {kind!r:.60}, not text", code="config.bad-rope-scaling")
    if kind == "none":
        return None
    if kind not in KINDS:
        raise UnsupportedError(
            f"rotary scaling {kind!r:.60}; handled: {', '.join(KINDS)}", code="config.unsupported-rope-scaling"
        )
    original = get("rope.scaling.original_context_length")
    return _made(
        kind, factor, context_length if original is None else original, get("rope.scaling.attn_factor"),
        get("rope.scaling.yarn_beta_fast"), get("rope.scaling.yarn_beta_slow"),
    )  # fmt: skip


def to_gguf(scaling: RopeScaling | None) -> list[tuple[str, str, Any]]:
    """(key behind the architecture's prefix, GGUF type, value), as llama.cpp's converter writes them."""
    if scaling is None:
        return []
    values: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        values["rope.scaling.original_context_length"] = scaling.original_context
        others = {
            "rope.scaling.attn_factor": (scaling.attention_factor, 1.0),
            "rope.scaling.yarn_beta_fast": (scaling.beta_fast, 32.0),
            "rope.scaling.yarn_beta_slow": (scaling.beta_slow, 1.0),
        }
        values |= {key: value for key, (value, usual) in others.items() if value != usual}
    return [(key, GGUF_KEYS[key], value) for key, value in values.items()]


# ── as config.json and APR's metadata say it ──────────────────────────────────────────────────────────────────────


def kind_of(raw: Any) -> str:
    """The kind that a `rope_scaling` or `rope_parameters` names; ``default`` for none."""
    if raw is None:
        return "default"
    if not isinstance(raw, Mapping):
        raise FormatError(f"rope_scaling is {raw!r:.60}, not an object", code="config.bad-rope-scaling")
    return str(raw.get("rope_type", raw.get("type", "default")))


def from_huggingface(raw: Any, context_length: int) -> RopeScaling | None:
    """The scaling that a `rope_scaling` (or `rope_parameters`) says; None for ``default``, and for ``llama3`` (`llama3_factors`).

    Raises:
        UnsupportedError: a kind, or a number of it, that is not handled, by name.
        FormatError: a value of a wrong kind, or out of range.
    """
    kind = kind_of(raw)
    if kind in ("default", "llama3"):
        return None
    if kind not in KINDS:
        raise UnsupportedError(
            f"rotary scaling {kind!r:.60}; handled: {', '.join(KINDS)}, and llama3 for Llama",
            code="config.unsupported-rope-scaling",
        )  # fmt: skip
    for key, plain in (("mscale", 1.0), ("mscale_all_dim", 0.0), ("truncate", True)):
        if raw.get(key) not in (None, plain):
            raise UnsupportedError(
                f"rotary scaling with {key} {raw[key]!r:.60}, which is not handled", code="config.unsupported-rope-scaling"
            )
    original, attention = raw.get("original_max_position_embeddings"), raw.get("attention_factor")
    factor = _number(raw.get("factor"), "factor")
    if attention is not None:  # of both together; a GGUF file has what YaRN's own is multiplied by
        attention = _number(attention, "attention_factor") / yarn_length(max(factor, 1.0))
    return _made(
        kind, factor, context_length if original is None else original, attention, raw.get("beta_fast"), raw.get("beta_slow")
    )


def to_huggingface(scaling: RopeScaling) -> dict[str, Any]:
    """The `rope_scaling` of a config.json."""
    said: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": short(scaling.factor)}
    if scaling.kind == "yarn":
        said["original_max_position_embeddings"] = scaling.original_context
        if scaling.attention_factor != 1:
            said["attention_factor"] = scaling.length
        if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
            said |= {"beta_fast": short(scaling.beta_fast), "beta_slow": short(scaling.beta_slow)}
    return said


def short(value: float) -> float:
    """The shortest decimal that is this float32."""
    return float(str(np.float32(value)))


def _made(kind: str, factor: Any, original: Any, attention: Any, fast: Any, slow: Any) -> RopeScaling | None:
    """A checked scaling; numbers are rounded to float32, which every container has. None where it changes nothing."""
    if type(original) is not int:
        raise FormatError(f"the original context is {original!r:.60}, not a whole number", code="config.bad-rope-scaling")
    longer = _number(factor, "factor")
    if kind == "linear":
        return None if longer == 1 else RopeScaling(kind, longer)
    given = {"attention_factor": attention, "beta_fast": fast, "beta_slow": slow}
    others = {name: _number(value, name) for name, value in given.items() if value is not None}
    return RopeScaling(kind, longer, original, **others)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 3.4e38:
        raise FormatError(f"{what} of rope_scaling is {value!r:.60}, not a number", code="config.bad-rope-scaling")
    return float(np.float32(value))


# ── Llama 3 ───────────────────────────────────────────────────────────────────────────────────────────────────────


def llama3_factors(raw: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """The divisors, float32 ``(D/2,)``, of a `rope_scaling` of kind ``llama3``, as llama.cpp's converter writes them.

    Raises:
        FormatError: a number is missing or out of range.
    """
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, context = (_number(raw.get(name), name) for name in names)
    if not (factor >= 1 and 0 < low < high and context > 0):
        raise FormatError(f"rotary scaling {dict(raw)!r:.160} is out of range", code="config.out-of-range")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, between))
    return found.astype(np.float32)


def llama3_of(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The `rope_scaling` of kind ``llama3`` that gives `factors`, float32 ``(D/2,)``: the published numbers are tried.

    Raises:
        UnsupportedError: no published scaling gives these divisors, so that config.json cannot say them.
    """
    for original in (8192, 4096, 16384, 32768):
        factor = short(float(factors.max()))
        said = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }  # fmt: skip
        if factor >= 1 and np.allclose(llama3_factors(said, theta, 2 * len(factors)), factors, rtol=1e-6):
            return said
    raise UnsupportedError(
        f"{FACTORS} is not what a published scaling of Llama 3 gives; config.json cannot say it",
        code="conversion.unknown-rope-factors",
    )


__all__ = ["FACTORS", "RopeScaling", "check_scaling", "frequencies", "from_gguf", "from_huggingface", "kind_of",
           "llama3_factors", "llama3_of", "to_gguf", "to_huggingface"]  # fmt: skip
