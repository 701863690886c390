"""aprlab: one model, two files, several engines. Where do they part, why, and what is the proof?

The verbs below are the public surface; each is loaded when first used, so that ``import aprlab`` costs nothing::

    import aprlab
    report = aprlab.convert("model.gguf", "model.apr")
    a, b = aprlab.open_model("model.gguf"), aprlab.open_model("model.apr")
    print(aprlab.generate(a, "What is 2+2?").text)
    print(aprlab.compare(a, b))

Three verbs bear the name of the module that they live in (`convert`, `trace`, `compare`). There the module itself can
be called: ``aprlab.trace(...)`` is ``aprlab.trace.trace(...)``, and ``from aprlab.trace import Trace`` works as ever.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# verb or noun -> where it lives: "module" or "module:attribute"
_PUBLIC = {
    "open_model": "aprlab.model:Model.open",
    "Model": "aprlab.model:Model",
    "Tensor": "aprlab.model:Tensor",
    "ModelConfig": "aprlab.model:ModelConfig",
    "convert": "aprlab.convert",
    "export": "aprlab.convert:export",
    "generate": "aprlab.qwen2.generate:generate",
    "trace": "aprlab.trace",
    "Trace": "aprlab.trace:Trace",
    "compare": "aprlab.compare",
    "Comparison": "aprlab.compare:Comparison",
    "peel": "aprlab.onion.peel:peel",
    "repair": "aprlab.onion.repair:repair",
    "run_notebook": "aprlab.lab:run_notebook",
    "embedded_model": "aprlab.paths:embedded_model",
    "AprlabError": "aprlab.errors:AprlabError",
    "FormatError": "aprlab.errors:FormatError",
    "UnsupportedError": "aprlab.errors:UnsupportedError",
    "UsageError": "aprlab.errors:UsageError",
    "NumericError": "aprlab.errors:NumericError",
}
_CALLABLE = {name for name, where in _PUBLIC.items() if where == f"aprlab.{name}"}
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
    "trace",
]


class _Verb(ModuleType):
    """A module that can be called by the name of its one verb."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """The import system sets a submodule as an attribute here: the moment to make a verb of it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and type(value) is ModuleType:
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'aprlab' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found: Any = import_module(module)
    for part in attribute.split(".") if attribute else ():
        found = getattr(found, part)
    return found


def __dir__() -> list[str]:
    return sorted({"__version__", *__all__})


if TYPE_CHECKING:  # what type checkers and editors see
    from aprlab.compare import Comparison, compare
    from aprlab.convert import convert, export
    from aprlab.errors import AprlabError, FormatError, NumericError, UnsupportedError, UsageError
    from aprlab.lab import run_notebook
    from aprlab.model import Model, ModelConfig, Tensor
    from aprlab.onion.peel import peel
    from aprlab.onion.repair import repair
    from aprlab.paths import embedded_model
    from aprlab.qwen2.generate import generate
    from aprlab.trace import Trace, trace

    open_model = Model.open
