"""Scripts of the checkout that are in no package, those of `docs/make` above all: each is loaded by its file, once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

MAKE = Path(__file__).resolve().parents[1] / "docs" / "make"


def page_script(name: str) -> ModuleType:
    """The script `name` of `docs/make`, imported; outside a checkout the test is skipped."""
    return script(MAKE / f"{name}.py")


def script(path: Path) -> ModuleType:
    """The script at `path`, imported; outside a checkout the test is skipped."""
    if not path.exists():
        pytest.skip("not in a checkout")
    known = f"{path.parent.parent.name}_{path.parent.name}_{path.stem}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]
