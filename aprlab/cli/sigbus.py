"""A mapped file that is cut short under a running command: one line, instead of a process that dies silently.

Reading a page of a map that the file no longer has raises SIGBUS, which Python cannot turn into an exception: the faulting
instruction would run again forever. So the command line installs a handler that names the file and the offset, removes
the command's temporary files and folders and leaves. It never returns, so it may be Python called from C. Libraries and
notebooks are left alone: there the process (the kernel) dies, as it would without aprlab.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from typing import Any

from aprlab.in_use import MAPPED, PARTS

_SA_SIGINFO = 4
_ADDRESS_AT = 16  # of si_addr within siginfo_t, 64-bit Linux
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """``struct sigaction`` of glibc and musl, 64-bit."""

    _fields_ = (("handler", _HANDLER), ("mask", ctypes.c_ubyte * 128), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p))


_kept: list[Any] = []  # a handler that was collected would be jumped to


def install() -> bool:
    """Answer SIGBUS with a line and exit status 2; False where this system's signals are not known."""
    if _kept or not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        return bool(_kept)
    handler = _HANDLER(_leave)
    _kept.append(handler)
    action = _Action(handler, flags=_SA_SIGINFO)
    return ctypes.CDLL(None, use_errno=True).sigaction(int(signal.SIGBUS), ctypes.byref(action), None) == 0


def line(address: int) -> str:
    """What to say of a page at this address that cannot be read."""
    for start, (nbytes, path) in MAPPED.items():
        if start <= address < start + nbytes:
            return f"{path}: at offset {address - start}: cut short while it was read ({_now(path)}, {nbytes} at open)"
    return f"memory at {address:#x} cannot be read: a file was cut short, or the disk failed"


def _now(path: os.PathLike[str]) -> str:
    try:
        return f"{os.path.getsize(path)} bytes now"
    except OSError:
        return "it is gone now"


def _leave(number: int, info: int, context: int) -> None:
    """The handler: never comes back."""
    try:
        address = ctypes.c_uint64.from_address(info + _ADDRESS_AT).value
        os.write(2, f"aprlab: {line(address)}\n".encode())
        for name in tuple(PARTS):
            try:
                os.unlink(name)
            except OSError:  # a folder, or gone already
                shutil.rmtree(name, ignore_errors=True)
    finally:
        os._exit(2)
