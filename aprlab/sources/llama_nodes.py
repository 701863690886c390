"""Which trace point a node of llama.cpp's graph is.

The same name comes once for each operation (``Qcur-0`` is a product, a sum and a rotation), so a node is known by
its name and its operation. Some nodes have no name of their own: the product after ``kqv_out-N`` is the attention's
output projection.
"""

from __future__ import annotations

import re

# name in the graph, operation -> step of a layer
_STEPS = {
    ("attn_norm", "MUL"): "attn_norm", ("Qcur_normed", "MUL"): "q_norm", ("Kcur_normed", "MUL"): "k_norm",
    ("Qcur", "ROPE"): "q_rope", ("Kcur", "ROPE"): "k_rope", ("ffn_inp", "ADD"): "ffn_inp", ("ffn_norm", "MUL"): "ffn_norm",
    ("ffn_gate", "MUL_MAT"): "gate", ("ffn_up", "MUL_MAT"): "up", ("ffn_swiglu", "SWIGLU"): "swiglu",
    ("ffn_out", "MUL_MAT"): "down", ("l_out", "ADD"): "out",
    # as versions before 2025 call them
    ("ffn_gate_par", "MUL"): "swiglu", ("kqv_merged_cont", "CONT"): "attn", ("kqv_out", "MUL_MAT"): "attn_out",
}  # fmt: skip
_PRODUCTS = {"Qcur": "q", "Kcur": "k", "Vcur": "v"}  # end in the sum with a bias, where there is one
_ENDS = {
    ("embd", "GET_ROWS"): "embed", ("inp_embd", "GET_ROWS"): "embed", ("result_norm", "MUL"): "norm",
    ("result_output", "MUL_MAT"): "logits",
}  # fmt: skip
_NUMBERED = re.compile(r"(.+)-(\d+)")


class Nodes:
    """Names the nodes of a pass, given one after another in the order of the graph.

    Args:
        biased: whether Q, K and V have biases.
    """

    def __init__(self, *, biased: bool) -> None:
        self._product = "ADD" if biased else "MUL_MAT"
        self._projection: int | None = None  # layer whose output projection is the next product

    def point(self, name: str, operation: str) -> str | None:
        """The trace point, or None for a node that is none."""
        if (name, operation) in _ENDS:
            return _ENDS[name, operation]
        found = _NUMBERED.fullmatch(name)
        if found is not None:
            stem, layer = found[1], int(found[2])
            if stem == "kqv_out" and operation != "MUL_MAT":  # reshaped or copied, according to how attention is computed
                self._projection = layer
                return f"layers.{layer}.attn"
            if stem in _PRODUCTS and operation == self._product:
                return f"layers.{layer}.{_PRODUCTS[stem]}"
            if (stem, operation) in _STEPS:
                return f"layers.{layer}.{_STEPS[stem, operation]}"
        if operation == "MUL_MAT" and self._projection is not None:
            layer, self._projection = self._projection, None
            return f"layers.{layer}.attn_out"
        return None
