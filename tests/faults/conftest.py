"""The embedded model, healthy and broken, each file made once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from differences import box
from faulty_files import Healthy, Source
from faulty_runs import Base

from aprlab.conversion.converter import convert
from aprlab.faults import FAULTS, Fault, convert_with
from aprlab.formats import open_model
from aprlab.formats.apr import Container
from aprlab.model.model import Model


@pytest.fixture(scope="session")
def model(tiny: Path) -> Iterator[Model]:
    with open_model(tiny) as opened:
        yield opened


@pytest.fixture(scope="session")
def source(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The embedded model in the types that a fault needs, encoded once each."""
    made: dict[str, Model] = {}

    def find(fault: Fault) -> Model:
        target = fault.given.get("quantize", "")
        if target not in made:
            path = tiny
            if target:
                path = tmp_path_factory.mktemp("source") / f"{target}.apr"
                convert(tiny, path, quantize=target)
            made[target] = open_model(path)
        return made[target]

    return find


@pytest.fixture(scope="session")
def healthy(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """The healthy conversion of that."""
    made: dict[Path, Container] = {}

    def find(fault: Fault) -> Container:
        model = source(fault)
        if model.path not in made:
            path = tmp_path_factory.mktemp("healthy") / "healthy.apr"
            convert_with(model, path, [])
            made[model.path] = box(path)
        return made[model.path]

    return find


@pytest.fixture(scope="session")
def broken(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a fault, made once."""
    made: dict[str, Path] = {}

    def find(id: str) -> Path:
        if id not in made:
            path = tmp_path_factory.mktemp("broken") / "broken.apr"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                convert_with(source(FAULTS[id]), path, [id])
            made[id] = path
        return made[id]

    return find


@pytest.fixture(scope="session")
def base(source: Source) -> Callable[[str], Base]:
    made: dict[Path, Base] = {}

    def find(id: str) -> Base:
        model = source(FAULTS[id])
        if model.path not in made:
            made[model.path] = Base(model)
        return made[model.path]

    return find
