"""Fixtures: the embedded model, and the real ones where this machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aprlab import paths

# Workers share the cores already: a second thread of BLAS in each only waits, and waiting burns a core. Set before NumPy is
# loaded, and for all children.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# Tests start some hundred processes: each would compile the whole package anew if none may keep what it has compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _real(file: str) -> Path:
    path = paths.models_dir() / file
    if not path.is_file():
        pytest.skip(f"{file} is not in {paths.models_dir()}")
    return path


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded model (GGUF)."""
    return paths.embedded_model()


@pytest.fixture(scope="session")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model as a Hugging Face directory, by dtype; to be read only."""
    from aprlab.conversion.converter import export

    root = tmp_path_factory.mktemp("hf")
    for dtype in ("f32", "f16", "bf16"):
        export(tiny, root / dtype, format="safetensors", dtype=dtype)
    return {dtype: root / dtype for dtype in ("f32", "f16", "bf16")}


@pytest.fixture(scope="session")
def real_05b() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (GGUF)."""
    return _real("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")


@pytest.fixture(scope="session")
def real_15b() -> Path:
    """Qwen2.5-Coder-1.5B-Instruct, Q4_K_M (GGUF)."""
    return _real("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="DIR", help="keep the browser test's pictures in this folder")
