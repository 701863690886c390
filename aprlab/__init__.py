"""aprlab: one model, two files, several engines. Where do they part, why, and what is the proof?

The verbs below are the public surface; each is loaded when first used, so that ``import aprlab`` costs nothing::

    import aprlab
    report = aprlab.convert("model.gguf", "model.apr")
    a, b = aprlab.open_model("model.gguf"), aprlab.open_model("model.apr")
    print(aprlab.generate(a, "What is 2+2?").text)
    print(aprlab.compare(a, b))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aprlab.version import __version__  # noqa: F401

# verb or noun -> where it lives: "module" or "module:attribute"
_PUBLIC = {
    "open_model": "aprlab.formats:open_model",
    "Model": "aprlab.model:Model",
    "Tensor": "aprlab.model:Tensor",
    "ModelConfig": "aprlab.model:ModelConfig",
    "convert": "aprlab.conversion:convert",
    "export": "aprlab.conversion:export",
    "generate": "aprlab.inference:generate",
    "trace": "aprlab.tracing:trace",
    "Trace": "aprlab.tracing:Trace",
    "compare": "aprlab.tracing:compare",
    "Comparison": "aprlab.tracing:Comparison",
    "source": "aprlab.sources:source",
    "peel": "aprlab.onion:peel",
    "repair": "aprlab.gates:repair",
    "run_notebook": "aprlab.lab:run_notebook",
    "verify": "aprlab.qualification.certificate:verify",
    "embedded_model": "aprlab.paths:embedded_model",
    "AprlabError": "aprlab.errors:AprlabError",
    "FormatError": "aprlab.errors:FormatError",
    "UnsupportedError": "aprlab.errors:UnsupportedError",
    "UsageError": "aprlab.errors:UsageError",
    "NumericError": "aprlab.errors:NumericError",
}
__all__ = [
    "AprlabError",
    "Comparison",
    "FormatError",
    "Model",
    "ModelConfig",
    "NumericError",
    "Tensor",
    "Trace",
    "UnsupportedError",
    "UsageError",
    "compare",
    "convert",
    "embedded_model",
    "export",
    "generate",
    "open_model",
    "peel",
    "repair",
    "run_notebook",
    "source",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'aprlab' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({"__version__", *__all__})


if TYPE_CHECKING:  # what type checkers and editors see
    from aprlab.conversion import convert, export
    from aprlab.errors import AprlabError, FormatError, NumericError, UnsupportedError, UsageError
    from aprlab.formats import open_model
    from aprlab.gates import repair
    from aprlab.inference import generate
    from aprlab.lab import run_notebook
    from aprlab.model import Model, ModelConfig, Tensor
    from aprlab.onion import peel
    from aprlab.paths import embedded_model
    from aprlab.qualification.certificate import verify
    from aprlab.sources import source
    from aprlab.tracing import Comparison, Trace, compare, trace
