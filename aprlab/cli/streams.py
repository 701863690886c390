"""The three standard streams, when the caller has closed one of them."""

from __future__ import annotations

import os
import sys


def fill_standard_streams() -> None:
    """Give closed standard streams a place that swallows everything.

    Else the next file that is opened would get their number, and what is printed would land in it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


__all__ = ["fill_standard_streams"]
