"""The models that `data/models.toml` knows: where they are published, their numbers, and what their files must hold."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from typing import Any

from aprlab import paths
from aprlab.errors import UsageError

# What the embedded model is asked first, and must say.
QUESTION, ANSWER = "What is 2+2?", "2 + 2 equals 4."


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One published model. None means unknown, never zero.

    Attributes:
        repository, file: on the Hugging Face hub.
        bytes, sha256: of the file.
        config: GGUF's names of the numbers -> values.
        tensors: ``float``, ``quantised`` (counts), ``output`` (has an output.weight of its own), ``by_type``.
    """

    name: str
    title: str
    repository: str
    file: str
    config: dict[str, Any]
    tensors: dict[str, Any]
    bytes: int | None = field(default=None)
    sha256: str | None = field(default=None)


def known_models() -> dict[str, KnownModel]:
    """All known models by name, in the order of the file."""
    with open(paths.data_dir() / "models.toml", "rb") as file:
        return {name: KnownModel(name, **entry) for name, entry in tomllib.load(file).items()}


def known_model(name: str) -> KnownModel:
    """The known model of this name; raises UsageError listing the names there are."""
    models = known_models()
    if name not in models:
        raise UsageError(f"unknown model {name!r}; known: {', '.join(models)}", code="model.unknown-name")
    return models[name]
