"""Writing whole files and folders, or nothing: temporary names, flushed and renamed."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from aprlab.display.plain_text import json_text
from aprlab.errors import AprlabError, UsageError
from aprlab.formats.leftovers import claim, exchange, sweep_parts, token
from aprlab.in_use import PARTS

_THERE = "exists already; use --force to replace it"


def check_output(output: Path, sources: list[Path], *, force: bool) -> None:
    """Refuse an output that is an input, a folder, or exists already (unless `force`)."""
    for source in sources:
        if output.exists() and source.exists() and output.samefile(source):
            raise UsageError("output and input are the same file", code="writing.output-is-input", path=output)
    if output.is_dir():
        raise UsageError("is a directory; name a file to write", code="writing.output-is-a-folder", path=output)
    if output.exists() and not force:
        raise UsageError(_THERE, code="writing.output-exists", path=output)
    if not output.parent.is_dir():
        raise UsageError(f"the folder {str(output.parent)!r} does not exist", code="writing.no-such-folder", path=output)


@contextmanager
def atomic(output: Path, *, force: bool = True) -> Iterator[IO[bytes]]:
    """A file that becomes `output` only if the block succeeds: written without a name, flushed to disk, named, renamed.

    Where the file system knows files without a name (Linux, most of them), a process that is killed leaves nothing at all;
    elsewhere a hidden ``.part`` file. A symbolic link is written through, not replaced. Without `force` a file that is there
    when the block ends is not replaced either, even if it appeared meanwhile.
    """
    target = _target(output)
    sweep_parts(target)
    name = ""
    try:
        handle = _nameless(target.parent)
        if handle is None:
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
            PARTS.add(name)
        claim(handle)
    except OSError as error:
        raise _unwritten(error, output) from None
    try:
        with _Flowing(handle, "wb") as file:
            yield file
            file.flush()
            mode = target.stat().st_mode if target.exists() else 0o666 & ~_umask()
            os.fchmod(handle, mode & 0o7777)
            os.fsync(handle)
            if not name:
                if force:
                    PARTS.add(name := str(target.with_name(f".{target.name}.{token()}.part")))
                # with a folder's descriptor (not looked at: the path is absolute) Python calls linkat, which can follow links
                os.link(f"/proc/self/fd/{handle}", name or target, src_dir_fd=handle, follow_symlinks=True)
        if name:
            give_name(name, target, force=force)
    except BaseException as error:
        if name:
            with suppress(OSError):
                os.unlink(name)
        if isinstance(error, OSError):
            raise _unwritten(error, output) from None
        raise
    finally:
        PARTS.discard(name)
    _sync(target.parent)


class _Flowing(io.FileIO):
    """A file whose bytes are on their way to the disk while more are written, where the system can be told to begin (Linux).

    Else all of them wait for the flush at the end: 0.2 s of half a gigabyte.
    """

    _step = 1 << 23

    def __init__(self, handle: int, mode: str) -> None:
        super().__init__(handle, mode)
        self._begun = self._new = 0

    def write(self, data: Any) -> int:
        count = super().write(data)
        self._new += count
        if self._new >= self._step and (begin := _begin_flush()) is not None:
            begin(self.fileno(), self._begun, 0, 2)  # 0: to the end of the file, 2: SYNC_FILE_RANGE_WRITE; a hint, may fail
            self._begun, self._new = self._begun + self._new, 0
        return count


@cache
def _begin_flush() -> Any:
    """Linux's ``sync_file_range``, None elsewhere."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform.startswith("linux") else None
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


def give_name(part: str | Path, target: Path, *, force: bool) -> None:
    """Rename a whole file; unless `force`, never to the name of a file that is there (FileExistsError)."""
    if force:
        os.replace(part, target)
        return
    try:
        os.link(part, target)  # a rename would replace
    except FileExistsError:
        raise
    except OSError:  # a file system on which a file has one name only
        if target.exists():
            raise FileExistsError from None
        os.replace(part, target)
    else:
        os.unlink(part)


def _unwritten(error: OSError, output: Path) -> UsageError:
    if isinstance(error, FileExistsError):
        return UsageError(_THERE, code="writing.output-exists", path=output)
    return UsageError(f"cannot be written: {error.strerror or error}", code="writing.cannot-write", path=output)


@contextmanager
def _standing_for(output: Path, made: Path) -> Iterator[None]:
    """An error about a file in the temporary folder `made` is reported for `output`, which it will become."""
    try:
        yield
    except AprlabError as error:
        if error.path is not None and made in Path(error.path).parents:
            error.path = output / Path(error.path).relative_to(made)
        raise


@contextmanager
def drafted(output: Path, *, force: bool) -> Iterator[Path]:
    """A path in a hidden folder next to `output`; the file that the block makes there becomes `output` if it succeeds."""
    target = _target(output)
    sweep_parts(target)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as folder, _held(folder):
            PARTS.add(folder)
            draft = Path(folder) / output.name
            try:
                with _standing_for(output.parent, Path(folder)):
                    yield draft
                give_name(draft, target, force=force)
            finally:
                PARTS.discard(folder)
    except OSError as error:
        raise _unwritten(error, output) from None


def _nameless(folder: Path) -> int | None:
    """A new file in `folder` that has no name yet; None where the system has no such thing."""
    if not (hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd")):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):  # as file systems and old kernels say
            return None
        raise


@contextmanager
def atomic_folder(output: Path, *, force: bool = False, ours: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """A folder that becomes `output` only when the block ends well: temporary name, flush to disk, rename.

    The block fills the folder that it is given. An empty `output` is replaced; one with files only if `force`, and only if
    `ours` knows every name in it, so that nothing is deleted that this project does not write.
    """
    target = _target(output)
    sweep_parts(target)

    def occupied() -> bool:
        """Whether there are files to be replaced; raises where they may not be."""
        if not target.exists():
            return False
        if not target.is_dir():
            raise UsageError("is a file; name a folder to write", code="writing.output-is-a-file", path=output)
        names = sorted(os.listdir(target))
        if names and not force:
            raise UsageError(_THERE, code="writing.output-exists", path=output)
        strange = [name for name in names if not ours(name) or not (target / name).is_file()]
        if strange:
            raise UsageError(f"holds {strange[0]!r}, which an export does not write; it is not replaced",
                             code="writing.foreign-file", path=output)  # fmt: skip
        return bool(names)

    occupied()
    if not target.parent.is_dir():
        raise UsageError(f"the folder {str(output.parent)!r} does not exist", code="writing.no-such-folder", path=output)
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise _unwritten(error, output) from None
    PARTS.add(str(made))
    try:
        with _held(made):
            with _standing_for(output, made):
                yield made
            for path in made.iterdir():
                path.chmod(0o666 & ~_umask())
                _sync(path)
            made.chmod(0o777 & ~_umask())
            _sync(made)
            if occupied():  # checked again: minutes have passed, and a file may have appeared there
                if not exchange(made, target):
                    _replace_in_two_steps(made, target)
                shutil.rmtree(made, ignore_errors=True)  # the old one, by now
            else:
                os.replace(made, target)
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritten(error, output) from None
        raise
    finally:
        PARTS.discard(str(made))
    _sync(target.parent)


def _replace_in_two_steps(made: Path, target: Path) -> None:
    """Where names cannot be swapped there is an instant without the folder; `sweep_parts` of the next run puts it back."""
    old = target.with_name(f".{target.name}.{token()}.old")
    with _held(target):
        os.rename(target, old)
        try:
            os.rename(made, target)
        except BaseException:
            os.rename(old, target)
            raise
        os.rename(old, made)


@contextmanager
def _held(folder: str | Path) -> Iterator[None]:
    """A folder that no other process takes for a leftover meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        claim(handle)
        yield
    finally:
        os.close(handle)


def _target(output: Path) -> Path:
    """Where an output really goes: through links; a circle of them, or a name that none can have, is one line."""
    try:
        return output.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError is what Python 3.11 calls a circle of links
        said = error.strerror if isinstance(error, OSError) and error.strerror else "a circle of links, or no name of a file"
        raise UsageError(f"cannot be written: {said}", code="writing.output-name", path=output) from None


def write_all(file: IO[bytes], data: Any) -> int:
    """Write a buffer to an unbuffered file, which may take it in parts; the number of bytes."""
    view = memoryview(data).cast("B")
    size = len(view)
    while view:
        view = view[file.write(view) :]
    return size


def write_whole(output: Path, content: bytes) -> None:
    """A whole file, or what was there before."""
    with atomic(output) as file:
        write_all(file, content)


def write_text(output: Path, text: str) -> None:
    """The same of a text, in UTF-8; half a character (of a file name that is no UTF-8) as its escape, which JSON knows, too."""
    write_whole(output, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, whole or not at all; numbers that are not finite become words (`json_text`)."""
    write_text(path, json_text(data, indent=1) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Flush a file, or make the rename inside a folder durable; not every file system can, and then it does not matter."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
