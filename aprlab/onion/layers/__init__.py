"""The layers of the onion, in the order in which they are peeled: cheapest first."""

from __future__ import annotations

from aprlab.onion.layers.config import Config
from aprlab.onion.layers.container import ContainerLayer
from aprlab.onion.layers.dtype import Dtype
from aprlab.onion.layers.layer import Layer
from aprlab.onion.layers.layout import Layout
from aprlab.onion.layers.naming import Naming
from aprlab.onion.layers.tokenizer import TokenizerLayer
from aprlab.onion.layers.weights import Weights

# Naming comes before the container's spans, which need to know whose bytes they are looking for.
FILE_LAYERS: tuple[Layer, ...] = (Naming(), ContainerLayer(), Dtype(), Layout(), Weights(), Config(), TokenizerLayer())

# Kind of deviation -> the layer that explains and repairs it. An unknown kind is nobody's, and raises KeyError.
OWNERS: dict[str, Layer] = {kind: layer for layer in FILE_LAYERS for kind in layer.kinds}

__all__ = ["FILE_LAYERS", "OWNERS", "Layer"]
