"""A repair gives the healthy file back, or nothing: judged by a run and by the gates, and never a guess unsaid."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import variant

from aprlab import paths
from aprlab.cli.app import run_cli
from aprlab.conversion.converter import convert
from aprlab.conversion.seams import Seams
from aprlab.errors import UsageError
from aprlab.faults import FAULTS, convert_with, file_faults
from aprlab.formats import gguf, open_model
from aprlab.gates import repairs
from aprlab.gates.repairs import RepairOutcome, attempt, repair
from aprlab.lab.pairs import given_for
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor
from aprlab.quants import quantise, types

REF = paths.embedded_model()
OPTIONS: dict[str, Any] = {"threads": 1, "max_tokens": 4}


def historic(seams: Seams) -> Seams:
    """Files with faults carry no record of their source; their healthy twin must not either."""
    return replace(seams, metadata=lambda metadata: {k: v for k, v in metadata.items() if k != "source_metadata"})


def pair(tmp_path: Path, id: str) -> tuple[Path, Path] | None:
    """The healthy file and the same with one fault; None where the fault is not for this model."""
    given = given_for([FAULTS[id]])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_with(REF, tmp_path / "broken.apr", [id], **given)
    except UsageError as error:
        assert error.code == "faults.changes-nothing"
        return None
    convert(REF, tmp_path / "healthy.apr", seams=historic, **given)
    return tmp_path / "healthy.apr", tmp_path / "broken.apr"


# Equivalent, not broken: decoded for good to a type that holds the values; there is nothing to repair.
EQUIVALENT = {"GH-438-apr", "default-dequantise", "unknown-to-f32", "unknown-to-f32-warned", "double-reversal"}


@pytest.mark.parametrize("id", file_faults())
def test_the_repaired_file_is_the_healthy_one_byte_for_byte(id: str, tmp_path: Path) -> None:
    made = pair(tmp_path, id)
    if made is None:
        pytest.skip("not for this model")
    healthy, broken = made
    outcome = attempt(broken, tmp_path / "fixed.apr", healthy, **OPTIONS)
    if outcome.written is None:
        assert outcome.code == "repair.nothing-found" and id in EQUIVALENT, outcome.headline
        assert not (tmp_path / "fixed.apr").exists()
        return
    assert outcome.exit_code == 0 and {change.certainty for change in outcome.changes} == {"exact"}
    assert outcome.judged["verdict"] == "same" and all(outcome.judged["gates"].values())
    assert (tmp_path / "fixed.apr").read_bytes() == healthy.read_bytes()
