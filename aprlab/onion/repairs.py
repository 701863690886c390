"""Repair: the fixed file, written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aprlab.conversion.converter import convert
from aprlab.errors import AprlabError, UsageError
from aprlab.formats.writing import check_output
from aprlab.model.model import Model
from aprlab.onion.fixes import drafted
from aprlab.onion.peeling import examine, peel
from aprlab.onion.verdict import Repair, Verdict


def repair(
    candidate: str | Path, output: str | Path, reference: str | Path | Model | None = None, *, force: bool = False, **options: Any
) -> Verdict:
    """Write the fixed file, atomically; everything that was found is fixed, needed for the answer or not.

    Args:
        candidate: the broken file.
        output: the APR file to write.
        reference: a sound file of the same model; without one, names, labels, dims, seals and config can be fixed.
        force: replace an existing output.
        options: as for `peel`.

    Returns:
        The verdict on the broken file, its proof completed by `written`: the verdict on the file that was written.

    Raises:
        UsageError: nothing is broken, or something that was found cannot be fixed.
    """
    sources = [Path(candidate)] + ([Path(reference)] if isinstance(reference, str | Path) else [])
    check_output(Path(output), sources, force=force)
    verdict, case, fixes = examine(reference, candidate, **options)
    if not fixes:
        raise UsageError(
            f"nothing to repair: the verdict is {verdict.verdict!r}", code="repair.nothing-found", path=candidate
        )
    lost = [fix.label for fix in fixes if not fix.possible]
    if lost:
        raise UsageError(
            f"cannot be put right without a reference: {', '.join(lost)}", code="repair.needs-a-reference", path=candidate
        )
    model = drafted(case, fixes) if case is not None else None
    if model is None or isinstance(model, AprlabError):
        raise UsageError(f"still broken when fixed: {model}", code="repair.still-broken", path=candidate)
    convert(model, output, force=force)
    after = peel(reference, output, **options)
    if verdict.repair is None:
        verdict.repair = Repair([fix.label for fix in fixes], False, {})
    verdict.repair.proof["written"] = {"file": str(output), "verdict": after.verdict}
    return verdict


__all__ = ["repair"]
