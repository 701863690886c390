"""Broken files that several tests look at, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprlab.faults import convert_with


@pytest.fixture(scope="session")
def mislabelled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GH-191: a strict reader refuses it."""
    path = tmp_path_factory.mktemp("widgets") / "labels.apr"
    convert_with(tiny, path, ["GH-191"])
    return path


@pytest.fixture(scope="session")
def one_scale(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file with other Q4_K blocks."""
    path = tmp_path_factory.mktemp("widgets") / "scales.apr"
    convert_with(tiny, path, ["q4k-one-scale"])
    return path
