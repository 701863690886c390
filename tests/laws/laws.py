"""The laws between the tools, asked of one file: what `run` does, what `peel` says alone and beside the source.

* peel ends with exit status 0 ⇒ run works, in finite numbers;
* run refuses a file ⇒ peel does not end with 0, and it has a finding that is not harmless;
* a healthy variant ⇒ peel ends with 0;
* peel ends with 0 beside a reference ⇒ the tokens are the reference's, or the verdict says that they are not, with a KL
  divergence that its types allow;
* no tool crashes, whatever the bytes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from generator import FileCase

from aprlab.errors import AprlabError
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.onion.peeling import DEADLINE, peel
from aprlab.onion.verdict import Verdict
from aprlab.published import QUESTION

TOKENS = 10


@dataclass
class Said:
    """What the tools say of one file; `broken` are the laws that this breaks, in words."""

    case: FileCase
    run: str = ""
    refused: str | None = None
    alone: Verdict | None = None
    pair: Verdict | None = None
    broken: list[str] = field(default_factory=list)


def answer(path: Path) -> tuple[str, list[int]]:
    """What `run` answers, greedily, with its tokens."""
    with open_model(path) as model:
        session = Session(model, threads=1)
        found = session.generate(QUESTION, max_tokens=TOKENS, raw=session.wants_raw)
    return found.text, found.tokens


@cache
def expected(source: Path) -> list[int]:
    """The source's own tokens."""
    return answer(source)[1]


def ask(
    case: FileCase, source: Path, folder: Path, *, alone: bool = True, pair: bool = True, fast: bool = False,
    deadline: float = DEADLINE,
) -> Said | None:  # fmt: skip
    """Make a file and ask all tools; None where the case cannot be made.

    Args:
        alone, pair: what peel is asked; `fast`: alone the file is not run, only looked at.
        deadline: seconds for the search for an explanation of a file that is not healthy.
    """
    path = case.make(folder / "case.gguf")
    if path is None:
        return None
    said = Said(case)
    tokens: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            said.run, tokens = answer(path)
        except AprlabError as error:
            said.refused = error.code
        except Exception as error:
            said.broken.append(f"run crashes: {type(error).__name__}: {error}")
            said.refused = "crash"
        sides: list[tuple[str, Any]] = [("alone", None)] * alone + [("pair", source)] * pair
        for name, ref in sides:
            try:
                verdict = peel(ref, path, max_tokens=TOKENS, threads=1, fast=fast and ref is None, deadline=deadline)
            except Exception as error:
                said.broken.append(f"peel {name} raises {type(error).__name__}: {error}")
                continue
            setattr(said, name, verdict)
            said.broken += _broken(said, name, verdict)
    if said.pair is not None and said.pair.exit_code == 0 and said.refused is None and tokens != expected(source):
        said.broken += _of_other_tokens(said.pair, tokens, expected(source))
    return said


def _of_other_tokens(verdict: Verdict, tokens: list[int], wanted: list[int]) -> list[str]:
    """A verdict that ends with 0 though the tokens are other ones: it says so, and the divergence is allowed."""
    if not any(f.code == "forward.answer-differs" for f in verdict.findings):
        return [f"pair {verdict.verdict}, but the tokens are {tokens}, not {wanted}"]
    if not verdict.cost["kl"] <= verdict.cost["kl_allowed"]:
        return [f"pair {verdict.verdict}, but KL is {verdict.cost['kl']}, at most {verdict.cost['kl_allowed']}"]
    return []


def _broken(said: Said, name: str, verdict: Verdict) -> list[str]:
    if verdict.exit_code == 0 and said.refused is not None:
        return [f"{name} {verdict.verdict}, but run refuses: {said.refused}"]
    looked_at = verdict.verdict == "unproved" and not verdict.health and all(f.harmless for f in verdict.findings)
    if verdict.exit_code != 0 and said.case.healthy and not looked_at:
        return [f"false alarm {name}: {verdict.verdict}: {verdict.findings[0] if verdict.findings else verdict.health}"]
    # A file that is no model of ours is looked at as far as that goes; why no run is said where a run would be.
    carried = verdict.verdict == "unproved" and str(said.refused).startswith("identity.") and "forward" in verdict.not_looked_at
    if said.refused is not None and not carried and not any(not f.harmless for f in verdict.findings):
        return [f"{name}: run refuses ({said.refused}), and nothing is found"]
    return []


__all__ = ["Said", "answer", "ask"]
