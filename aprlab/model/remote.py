"""Files by URL, read in ranges and never downloaded: ``https://``, and whatever fsspec knows (``s3://``, ``hf://``…).

HTTP needs nothing but the standard library, since what it must not do is known here exactly: take a whole body where a range
was asked for, take a short body for a whole one, or mix two versions of a file. Other schemes go through fsspec (extra
`remote`) and its own packages.
"""

from __future__ import annotations

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import FormatError, UsageError
from aprlab.model.content import CHUNK, Content

SCHEMES = ("http", "https", "s3", "hf", "gs", "gcs", "az", "abfs", "ftp", "sftp", "memory")
_URL = re.compile(rf"({'|'.join(SCHEMES)}):/+(.+)")
TRIES = 4  # of one range
WAIT = 0.2  # seconds before the second, doubled each time
TIMEOUT = 30.0  # seconds without a byte
STEP = 8 * CHUNK  # bytes of one request where a whole tensor is read
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses that may pass
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


def url_of(path: str | Path) -> str | None:
    """The URL that a path is, None where it is none. `Path` makes one slash of two; that is undone here."""
    found = _URL.fullmatch(str(path))
    return None if found is None else f"{found[1]}://{found[2]}"


class RemoteFile(ABC):
    """A file of which ranges can be read, from several threads.

    Attributes:
        path: for messages and suffixes; `url_of` gives the URL back.
        size: its bytes.
    """

    def __init__(self, url: str) -> None:
        self.url, self.path = url, Path(url)
        self.size = 0
        self.bytes_read = 0
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes ``start … stop``: ``uint8 (stop - start,)``; a broken answer is asked for again, a few times.

        Raises:
            UsageError: the server refuses, cannot be reached, or does not give ranges.
            FormatError: the range is beyond the end, or the file was changed since it was opened.
        """
        if start >= stop:
            return np.zeros(0, np.uint8)
        if stop > self.size:
            raise FormatError(
                f"has {self.size} bytes, {stop} are asked for", code="remote.beyond-end", path=self.url, offset=start
            )
        import http.client  # with TLS, 20 ms of every start, and of use for remote files alone

        wait, problem = WAIT, "no answer"
        for left in range(TRIES - 1, -1, -1):
            try:
                data = self._range(start, stop)
            except (OSError, http.client.HTTPException) as error:
                data, problem = b"", str(error) or type(error).__name__
            if len(data) == stop - start:
                with self._lock:
                    self.bytes_read += len(data)
                return np.frombuffer(data, np.uint8)
            if data:
                problem = f"{len(data)} of {stop - start} bytes came"
            if left:
                time.sleep(wait)
                wait *= 2
        raise UsageError(
            f"bytes {start}..{stop} could not be read in {TRIES} tries: {problem}", code="remote.unreadable", path=self.url
        )

    @abstractmethod
    def _range(self, start: int, stop: int) -> bytes:
        """The bytes; fewer, or an OSError, where the answer broke off."""


class HttpFile(RemoteFile):
    """Over HTTP, with the standard library."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._version: str | None = None
        self._learn()

    def _learn(self) -> None:
        """Ask for one byte, to learn size and version; broken answers are asked for again."""
        import http.client

        wait = WAIT
        for left in range(TRIES - 1, -1, -1):
            try:
                self._range(0, 1)
                return
            except (OSError, http.client.HTTPException) as error:
                if not left:
                    raise UsageError(
                        f"cannot be reached: {error or type(error).__name__}", code="remote.unreachable", path=self.url
                    ) from None
            time.sleep(wait)
            wait *= 2

    def _range(self, start: int, stop: int) -> bytes:
        import urllib.error
        import urllib.request

        request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                self._check(answer, start, stop)
                return bytes(answer.read(stop - start))
        except urllib.error.HTTPError as error:
            status, why = error.code, error.reason
            error.close()
            if status in _AGAIN:
                raise OSError(f"the server says {status} {why}") from None
            if status in (404, 410):
                raise UsageError(f"the server says {status} {why}", code="remote.not-found", path=self.url) from None
            if status == 416:
                raise FormatError("is empty, or became shorter", code="remote.beyond-end", path=self.url) from None
            raise UsageError(f"the server says {status} {why}", code="remote.refused", path=self.url) from None

    def _check(self, answer: Any, start: int, stop: int) -> None:
        """Nothing of the body is read where it is not the range that was asked for."""
        if answer.status != 206:
            raise UsageError(
                f"the server ignores ranges (status {answer.status}) and would send the whole file; download it, give the path",
                code="remote.no-ranges", path=self.url,
            )  # fmt: skip
        found = _RANGE.fullmatch((answer.headers.get("Content-Range") or "").strip())
        if found is None or int(found[1]) != start or int(found[2]) >= stop:
            raise UsageError(
                f"the server gives another range ({answer.headers.get('Content-Range')!r}) than bytes {start}-{stop - 1}",
                code="remote.other-range", path=self.url,
            )  # fmt: skip
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        size = int(found[3])
        with self._lock:
            if not self.size:
                self.size, self._version = size, version
            elif (size, version) != (self.size, self._version):
                raise FormatError("was changed while it was read", code="remote.changed", path=self.url, offset=start)


class FsspecFile(RemoteFile):
    """Through fsspec and whatever package knows the scheme."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        scheme = url.partition(":")[0]
        try:
            import fsspec

            self._system, self._name = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"{scheme}:// needs fsspec (pip install 'aprlab[remote]') and its package for {scheme}: {error}",
                code="remote.not-installed", path=self.url,
            ) from None  # fmt: skip
        try:
            self.size = int(self._system.size(self._name) or 0)
        except (FileNotFoundError, IsADirectoryError) as error:
            said = f"cannot be opened: {error or type(error).__name__}"
            raise UsageError(said, code="remote.not-found", path=self.url) from None
        except Exception as error:  # each file system has errors of its own
            said = f"cannot be opened: {error or type(error).__name__}"
            raise UsageError(said, code="remote.refused", path=self.url) from None

    def _range(self, start: int, stop: int) -> bytes:
        try:
            return bytes(self._system.cat_file(self._name, start=start, end=stop))
        except Exception as error:
            raise OSError(str(error) or type(error).__name__) from None


class Remote(Content):
    """`nbytes` of a remote file from `offset` on; read anew each time."""

    __slots__ = ("_nbytes", "file", "offset")

    def __init__(self, file: RemoteFile, offset: int, nbytes: int) -> None:
        self.file, self.offset, self._nbytes = file, offset, nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def read(self, start: int, stop: int) -> np.ndarray:
        start, stop = max(0, start), min(stop, self._nbytes)
        return self.file.read(self.offset + start, self.offset + max(start, stop))

    def chunks(self, step: int = CHUNK) -> Iterator[Any]:
        for at in range(0, self._nbytes, STEP):
            part = self.read(at, min(at + STEP, self._nbytes))
            yield from (part[n : n + step].data for n in range(0, len(part), step))


def content_at(file: np.ndarray, remote: RemoteFile | None, start: int, stop: int) -> Content | np.ndarray:
    """Bytes ``start … stop`` of a file as what a tensor is made of: a view on the local one, or ranges of the remote one."""
    return file[start:stop] if remote is None else Remote(remote, start, max(0, stop - start))


_OPEN: dict[str, RemoteFile] = {}


def open_url(url: str) -> RemoteFile:
    """The file at a URL, asked for its size once.

    Raises:
        UsageError: it cannot be reached or is refused, ranges are not given, or a package is missing.
    """
    if url not in _OPEN:
        if len(_OPEN) >= 16:
            _OPEN.pop(next(iter(_OPEN)))
        _OPEN[url] = HttpFile(url) if url.startswith(("http://", "https://")) else FsspecFile(url)
    return _OPEN[url]


def is_there(url: str) -> bool:
    """Whether there is a file at a URL.

    Raises:
        UsageError: that cannot be told: the server cannot be reached, refuses, or does not give ranges.
    """
    try:
        open_url(url)
    except UsageError as error:
        if error.code != "remote.not-found":
            raise
        return False
    return True


def forget() -> None:
    """Ask again for everything: files may have changed."""
    _OPEN.clear()


def refuse_remote(contents: Iterator[Content], path: Path) -> None:
    """Raise UsageError where bytes would be fetched again for every use of them."""
    if any(isinstance(content, Remote) for content in contents):
        raise UsageError(
            "is a URL: its header, tensors and blocks can be looked at (inspect, fingerprint, diff) and converted; download it "
            "to run or repair it", code="remote.not-for-runs", path=path,
        )  # fmt: skip


__all__ = ["Remote", "RemoteFile", "content_at", "forget", "is_there", "open_url", "refuse_remote", "url_of"]
