"""What a killed process leaves behind, and how the next run finds it: temporary names that are claimed while their process lives.

A claim is a lock (`flock`) on the open file or folder: the system drops it when its process ends, however it ends. So whatever
has one of our temporary names and no lock has no owner, and is removed. Where locks do not work, nothing is removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_CLAIMS: dict[str, int] = {}  # path → descriptor that holds its lock
_RANDOM = "[a-z0-9_]{8}"  # as `tempfile` makes them
_NEW = "aprlab-new-"
WORK = "aprlab-work-"  # of models that are made on the way to a verdict


def claim(handle: int) -> None:
    """Lock an open file or folder for this process; does nothing where the file system has no locks."""
    with suppress(OSError, NameError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def token() -> str:
    """The random part of a temporary name."""
    return os.urandom(4).hex()


def claimed_folder(prefix: str) -> Path:
    """A new folder in TMPDIR that is this process's until `release_folder`, or until the process ends."""
    made = Path(tempfile.mkdtemp(prefix=_NEW))
    handle = os.open(made, os.O_RDONLY)
    claim(handle)
    folder = made.with_name(f"{prefix}{token()}")
    os.rename(made, folder)  # it never has its name without its lock
    _CLAIMS[str(folder)] = handle
    return folder


def release_folder(folder: Path) -> None:
    """Remove a claimed folder with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    if (handle := _CLAIMS.pop(str(folder), None)) is not None:
        os.close(handle)


@contextmanager
def temporary_folder(prefix: str = WORK) -> Iterator[Path]:
    """A folder in TMPDIR for the length of a block; where this process is killed, the next one with this prefix removes it."""
    sweep_temporary(prefix)
    folder = claimed_folder(prefix)
    try:
        yield folder
    finally:
        release_folder(folder)


def sweep_temporary(prefix: str) -> None:
    """Remove what processes that are gone have left in TMPDIR under this prefix, and folders that were never named."""
    place = Path(tempfile.gettempdir())
    _sweep(place, re.compile(re.escape(prefix) + _RANDOM + r"(?:\.log)?"))
    _sweep(place, re.compile(_NEW + _RANDOM), older=3600.0)


def sweep_parts(target: Path) -> None:
    """Remove the temporary files and folders that a killed writer of `target` has left next to it.

    An old folder whose replacement had not come yet gets its name back first.
    """
    parts = re.compile(rf"\.{re.escape(target.name)}\.{_RANDOM}\.(?:part|old)")
    old = re.compile(rf"\.{re.escape(target.name)}\.{_RANDOM}\.old")
    if not os.path.lexists(target):
        for path in _matching(target.parent, old):
            if _nobodys(path):
                with suppress(OSError):
                    os.rename(path, target)
                break
    _sweep(target.parent, parts)


def _matching(folder: Path, name: re.Pattern[str]) -> Iterator[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if name.fullmatch(entry.name):
                yield Path(entry.path)


def _sweep(folder: Path, name: re.Pattern[str], older: float = 0.0) -> None:
    for path in list(_matching(folder, name)):
        if _nobodys(path, older):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _nobodys(path: Path, older: float = 0.0) -> bool:
    """It is this user's, no link, and no living process holds its lock."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        info = os.fstat(handle)
        if info.st_uid != os.getuid() or time.time() - info.st_mtime < older:
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, NameError):
        return False
    finally:
        os.close(handle)
    return True


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot.

    Raises:
        OSError: it can, and refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin":
        swap = getattr(libc, "renamex_np", None)
        status = None if swap is None else swap(*names, 2)  # RENAME_SWAP
    else:
        swap = getattr(libc, "renameat2", None)
        status = None if swap is None else swap(_HERE, names[0], _HERE, names[1], 2)  # RENAME_EXCHANGE
    if status is None:
        return False
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(b))


_HERE = -100  # AT_FDCWD; the paths are absolute
