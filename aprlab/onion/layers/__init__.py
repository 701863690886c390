"""The layers of the onion, in the order in which they are peeled: cheapest first."""

from __future__ import annotations

from aprlab.onion.layers.config import ConfigLayer
from aprlab.onion.layers.container import ContainerLayer
from aprlab.onion.layers.dtype import DtypeLayer
from aprlab.onion.layers.layer import Layer
from aprlab.onion.layers.layout import LayoutLayer
from aprlab.onion.layers.naming import NamingLayer
from aprlab.onion.layers.tokenizer import TokenizerLayer
from aprlab.onion.layers.weights import WeightsLayer

# Naming comes before the container's spans, which need to know whose bytes they are looking for.
FILE_LAYERS: tuple[Layer, ...] = (
    NamingLayer(), ContainerLayer(), DtypeLayer(), LayoutLayer(), WeightsLayer(), ConfigLayer(), TokenizerLayer(),
)  # fmt: skip

# Kind of deviation -> the layer that explains and repairs it. An unknown kind belongs to none, and raises KeyError.
OWNERS: dict[str, Layer] = {kind: layer for layer in FILE_LAYERS for kind in layer.kinds}

__all__ = ["FILE_LAYERS", "OWNERS", "Layer"]
