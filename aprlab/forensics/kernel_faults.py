"""What each kernel fault does to a model.

The faulty dequantise kernel decodes the model's tensors on the PTX machine; the reference engine then speaks with the wrong
weights. That is what an engine with the faulty mat-vec kernels says, in minutes instead of hours: the tests hold that
both kernels are wrong alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from aprlab.engines.ptx import PtxDevice
from aprlab.errors import NumericError
from aprlab.inference.session import generate
from aprlab.kernels.cuda import mutations, verify
from aprlab.kernels.cuda.mutations import MUTATIONS
from aprlab.model.model import Model
from aprlab.quants import types


@dataclass(frozen=True, slots=True)
class Effect:
    """Of one fault on one model: over the values of all tensors whose type it touches."""

    name: str
    tensors: int
    wrong: float  # share of values whose bits differ
    correlation: float  # of wrong with right values, where both are finite
    broken: float  # share of values that are NaN or infinite
    tokens: int  # of the healthy answer's that still stand, from its first on
    answer: str


def faulty(model: Model, name: str) -> tuple[Model, dict[str, np.ndarray]]:
    """(the model with the tensors of the fault's types as float32, wrongly decoded; those values by tensor)."""
    device = PtxDevice(**mutations.options(name))
    wrong = {
        key: verify.decode(device, tensor)
        for key, tensor in model.tensors.items()
        if len(tensor.shape) == 2 and tensor.type.name in MUTATIONS[name].types
    }
    tensors = {
        key: tensor.replace(type=types.F32, raw=wrong[key].reshape(-1).view(np.uint8)) if key in wrong else tensor
        for key, tensor in model.tensors.items()
    }
    return replace(model, tensors=tensors), wrong


def effects(model: Model, prompt: str, names: Sequence[str] = (), max_tokens: int = 12) -> Iterator[Effect]:
    """The healthy answer first (named ``none``), then one effect for each fault that touches a type of the model.

    `names` are the only faults to look at; none of them means all.
    """
    def answer(of: Model) -> tuple[list[int], str]:
        try:
            said = generate(of, prompt, engine="reference", max_tokens=max_tokens)
        except NumericError as error:  # a broken model may end in NaN, which is an answer too
            return [], f"({error.message})"
        return list(said.tokens), said.text

    right, text = answer(model)
    yield Effect("none", 0, 0.0, 1.0, 0.0, len(right), text)
    kinds = {tensor.type.name for tensor in model.tensors.values() if len(tensor.shape) == 2}
    for name, mutation in MUTATIONS.items():
        if not kinds & set(mutation.types) or (names and name not in names):
            continue
        broken_model, wrong = faulty(model, name)
        differ = bad = count = 0
        moments = np.zeros(6)
        for key, values in wrong.items():
            truth = model.tensors[key].dequantise()
            differ += int(np.count_nonzero(truth.view(np.uint32) != values.view(np.uint32)))
            finite = np.isfinite(values)
            bad += int(np.count_nonzero(~finite))
            count += values.size
            a, b = truth[finite].astype(np.float64), values[finite].astype(np.float64)
            moments += [a.size, a.sum(), b.sum(), a @ a, b @ b, a @ b]
        n, a, b, aa, bb, ab = moments
        spread = np.sqrt((aa / n - (a / n) ** 2) * (bb / n - (b / n) ** 2))
        tokens, text = answer(broken_model)
        same = next((i for i, (x, y) in enumerate(zip(right, tokens, strict=False)) if x != y), min(len(right), len(tokens)))
        correlation = float((ab / n - a * b / n**2) / spread) if spread > 0 else float("nan")
        yield Effect(name, len(wrong), differ / count, correlation, bad / count, same, text)
