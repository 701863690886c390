"""A source that runs another model than the one it is judged on: said at once, before any fault is looked for.

A program with other weights is wrong in every product, and no form of an operation explains one. So a few small products and the
embedding's rows are enough to know, where a search for names would try every form on every matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.engines import roundings
from aprlab.errors import UsageError
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.onion.foreign_forms import forms, op_name
from aprlab.onion.foreign_naming import explained_by_contract, gives
from aprlab.onion.foreign_shadow import Judges, Operation, distance
from aprlab.onion.words import Mechanism
from aprlab.sources.base import Source

MOST = 0.75  # of the products: so many are wrong where the weights are others
NEAR = 0.3  # relative distance up to which rows may be the same ones in another encoding
# Numbers of a model that a source must have in common with it; the others (a base, an epsilon) may be a fault of the source.
SHAPE = (
    "architecture", "block_count", "embedding_length", "feed_forward_length", "head_count", "head_count_kv", "head_dim",
    "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class OtherWeights:
    """What a source computes with, where it is not the model's weights.

    Attributes:
        cause: in words.
        evidence: how many products are wrong, how far the embedding and the norms are off.
        same_file: the source has the model's own file: then it reads or multiplies it wrongly.
    """

    cause: Mechanism
    evidence: dict[str, Any]
    same_file: bool


def check_shape(source: Source, model: Model) -> None:
    """Raises UsageError where a source runs a model of other dimensions, naming each that differs."""
    ours = model.config
    unlike = [
        f"{name} {getattr(source.config, name)}, not {getattr(ours, name)}"
        for name in SHAPE
        if getattr(source.config, name) != getattr(ours, name)
    ]
    if unlike:
        said = f"{source.name} runs another model ({source.file}): {'; '.join(unlike)}. Give the file that it runs as MODEL"
        raise UsageError(said, code="source.other-model", path=Path(model.path))


def other_weights(operations: Sequence[Operation], judges: Judges, config: ModelConfig, file: Path) -> OtherWeights | None:
    """What is known where most products are wrong, in all layers, and neither a contract nor a form gives those tried.

    Args:
        operations: all of the trace.
        file: that the source runs.
    """
    products = [o for o in operations if o.op == "matmul" and o.alone]
    bad = [o for o in products if not o.fits]
    layers = {o.layer for o in products if o.layer is not None}
    if len(bad) < max(2, MOST * len(products)) or {o.layer for o in bad if o.layer is not None} != layers:
        return None
    embed = next((o for o in operations if o.op == "embed" and o.alone), None)
    rounded = None if embed is None or embed.fits else _rounded(embed, bad)
    probes = [_smallest(bad, layer, judges.model) for layer in _some(sorted(layers))]
    if rounded is None:
        probes += [embed] if embed is not None and not embed.fits else []
        if any(_explained(probe, judges, config) for probe in probes):
            return None
    same = file.exists() and Path(judges.model.path).exists() and file.samefile(judges.model.path)
    evidence: dict[str, Any] = {
        "products_off": f"{len(bad)} of {len(products)}", "off": float(np.median([np.median(o.off) for o in bad])),
        "runs": str(file),
    }  # fmt: skip
    if rounded is None:
        evidence["no_form_gives"] = [probe.point for probe in probes]
    norms = [o for o in operations if o.op == "norm" and o.alone and not o.fits and _other_norm(o)]
    if norms:
        evidence["norms_with_other_weights"] = len(norms)
    if embed is not None:
        evidence["embedding_off"] = float(np.median(embed.off))
    if (embed is None or embed.fits) and not norms:
        return OtherWeights(Mechanism("forward.products-differ", {"wrong": len(bad), "products": len(products)}), evidence, same)
    what = "other values" if embed is None or embed.fits else f"the same rows rounded to {rounded}" if rounded else _kind(embed)
    code = "forward.weights-differ" if same else "instrument.other-weights"
    return OtherWeights(Mechanism(code, {"wrong": len(bad), "products": len(products), "what": what}), evidence, same)


def _some(layers: list[int]) -> list[int]:
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]}) if layers else []


def _smallest(bad: Sequence[Operation], layer: int, model: Model) -> Operation:
    return min((o for o in bad if o.layer == layer), key=lambda o: model.tensor(op_name(o)).size)


def _explained(probe: Operation, judges: Judges, config: ModelConfig) -> bool:
    return explained_by_contract(probe, judges) or any(gives(form, probe, judges) for form in forms(probe, judges, config))


def _kind(embed: Operation) -> str:
    return "the same rows in another encoding" if float(np.median(embed.off)) < NEAR else "the rows of another table"


def _rounded(embed: Operation, bad: Sequence[Operation]) -> str | None:
    """To which type the rows are rounded that are the model's but for that; None where a program rounds all its values so."""
    assert embed.exact is not None
    for name in ("f16", "bf16"):
        rounding = roundings.FLOATS[name]
        if not np.array_equal(rounding(embed.exact.astype(np.float32)), embed.given):
            continue
        if not all(np.array_equal(rounding(o.given), o.given) for o in bad[:3]):
            return name.upper()
    return None


def _other_norm(norm: Operation) -> bool:
    """Whether the norm's result is that of one other vector of weights, at all positions."""
    assert norm.exact is not None
    x, _, eps = norm.args
    rows = x.reshape(-1, x.shape[-1])[norm.rows] if norm.given.ndim == 2 else x.reshape(norm.given.shape)[norm.rows]
    rows = rows.reshape(-1, x.shape[-1]).astype(np.float64)
    given = norm.given.reshape(rows.shape).astype(np.float64)
    if len(rows) < 2:
        return False
    scaled = rows / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + eps)
    with np.errstate(all="ignore"):
        weights = np.sum(given * scaled, axis=0) / np.sum(scaled**2, axis=0)
    off = distance(given, scaled * weights, given)
    return float(np.median(off)) < 0.1 * float(np.median(norm.off))


__all__ = ["OtherWeights", "check_shape", "other_weights"]
