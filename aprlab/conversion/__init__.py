"""GGUF, APR and SafeTensors into each other. Blocks stay as they are unless another type is asked for by name.

Everything streams: memory does not grow with the file, and the output appears whole or not at all. SafeTensors has no
blocks, so that writing it decodes, and what that costs is measured on the way and reported.
"""

from aprlab.conversion.converter import FORMATS, convert, export
from aprlab.conversion.cost import Cost
from aprlab.conversion.report import ConversionReport, TensorLine
from aprlab.conversion.seams import Seams, healthy_seams

__all__ = ["FORMATS", "ConversionReport", "Cost", "Seams", "TensorLine", "convert", "export", "healthy_seams"]
