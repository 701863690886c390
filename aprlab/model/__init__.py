"""A model inside aprlab: config, tokenizer data and tensors, independent of the container they came from.

Raw blocks are views on the mapped file; nothing is dequantised until it is needed. Names are GGUF's, shapes are
NumPy's (rows first). ggml's order is called `ne` and is always the reverse of `shape`; data never moves.
"""

from aprlab.model.architecture import ARCHITECTURES, Architecture, architecture_of
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.content import Content
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor

__all__ = ["ARCHITECTURES", "Architecture", "Content", "Model", "ModelConfig", "Origin", "Tensor", "TokenizerData",
           "architecture_of"]  # fmt: skip
