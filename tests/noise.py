"""Every sentence that a person might read, replaced by noise: whatever decides by wording decides differently then.

The tables of words, the messages of errors and the titles of faults come out as random letters, other ones at each look.
"""

from __future__ import annotations

import importlib
import random
import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from aprlab.errors import AprlabError
from aprlab.faults import Fault

TABLES = ("aprlab.onion.words", "aprlab.gates.words")  # modules whose `TEMPLATES` turn codes into sentences

_LETTERS = random.Random(13)


def babble() -> str:
    """Forty random letters; two calls never give the same."""
    return "".join(_LETTERS.choices(string.ascii_lowercase, k=40))


class _NoisyTable(dict[str, str]):
    """The codes are known as before; each look at a sentence gives another one."""

    def __getitem__(self, code: str) -> str:
        super().__getitem__(code)  # an unknown code is an error still
        return babble()


@contextmanager
def noise() -> Iterator[None]:
    """Noise for as long as the block runs."""
    plain = AprlabError.__init__

    def noisy(self: AprlabError, message: str, **known: Any) -> None:
        plain(self, babble(), **known)

    with pytest.MonkeyPatch.context() as patch:
        for name in TABLES:
            module = importlib.import_module(name)
            patch.setattr(module, "TEMPLATES", _NoisyTable(module.TEMPLATES))
        patch.setattr(AprlabError, "__init__", noisy)
        patch.setattr(Fault, "title", property(lambda fault: babble(), lambda fault, title: None), raising=False)
        yield
