"""The one door to a Dask cluster: connected, its workers asked for version and files, its failures said in one line.

The workers are other processes, most often on other machines, that see the same files under the same paths. They get
functions by name and small values, never tensors; what they give back is put in the caller's order, so that a result does
not depend on who computed which part.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from aprlab.errors import AprlabError, UsageError
from aprlab.version import __version__

T = TypeVar("T")
R = TypeVar("R")
CONNECT = "10s"  # until a scheduler must answer
ALONE = 20.0  # seconds without a single worker, after which the work is given up: a nanny starts a dead one again in less
LOOK = 2.0  # seconds after which the workers are counted, where nothing is finished
ENDS = 1 << 16  # bytes at both ends of a file that must be the same on every machine
_URL = re.compile(r"[a-z0-9]+:/+.+")


class Cluster:
    """Workers that are there, have this aprlab, and see the files.

    Attributes:
        address: of the scheduler.
        workers: how many there were when it was opened.
    """

    def __init__(self, client: Any, address: str, workers: int) -> None:
        self._client, self.address, self.workers = client, address, workers

    def map(
        self, function: Callable[[T], R], items: Sequence[T], done: Callable[[int], object] | None = None
    ) -> list[R]:
        """`function` of each item, in the order of `items`; it is called somewhere, perhaps more than once.

        Args:
            function: of a module, so that it has a name there.
            items: small; the first ones are started first.
            done: called with the number of an item when its result is here.

        Raises:
            AprlabError: what a call raised; a worker that dies of an item again and again; no worker is left.
        """
        found: dict[int, R] = {}
        for n, result in self.each(function, items):
            found[n] = result
            if done is not None:
                done(n)
        return [found[n] for n in range(len(items))]

    def each(
        self, function: Callable[[T], R], items: Sequence[T], names: Sequence[str] | None = None
    ) -> Iterator[tuple[int, R]]:
        """As `map`: number and result of an item, as they come. `names` are shown by the scheduler's own pages."""
        distributed = import_module("distributed")
        shown = names or [f"{n}" for n in range(len(items))]
        started = f"aprlab-{os.getpid()}-{time.monotonic_ns()}"
        futures = {
            self._client.submit(function, item, pure=False, key=f"{started}-{name}"): n
            for n, (item, name) in enumerate(zip(items, shown, strict=True))
        }
        left, alone = set(futures), 0.0
        while left:
            try:
                with self._client.as_current():
                    finished, left = distributed.wait(left, LOOK, "FIRST_COMPLETED")
            except TimeoutError:
                alone = 0.0 if self._client.nthreads() else alone + LOOK
                if alone >= ALONE:
                    raise AprlabError(
                        f"the Dask cluster at {self.address} has lost all its workers; {len(left)} of {len(items)} parts are "
                        "open", code="cluster.no-workers-left",
                    ) from None  # fmt: skip
                continue
            for future in finished:
                try:
                    yield futures[future], future.result()
                except distributed.KilledWorker as error:
                    raise AprlabError(
                        f"a worker of the Dask cluster at {self.address} died of part {shown[futures[future]]!r} of "
                        f"{len(items)}, and so did those that tried it again ({error.last_worker.address} was the last): look "
                        "at its log and its memory limit", code="cluster.worker-killed",
                    ) from None  # fmt: skip


@contextmanager
def connect(address: str, files: Sequence[str | Path] = ()) -> Iterator[Cluster]:
    """The cluster whose scheduler listens at `address`, once every worker was asked.

    Args:
        address: ``tcp://host:8786``.
        files: files and folders that every worker must see under the same (absolute) path, with the same size and ends;
            URLs are left to their readers.

    Raises:
        UsageError: no scheduler, no workers, a worker with another aprlab or none, or one that does not see a file.
    """
    try:
        distributed = import_module("distributed")
    except ImportError:
        raise UsageError(
            "a Dask scheduler needs the extra `cluster`: pip install 'aprlab[cluster]'", code="cluster.extra"
        ) from None
    try:
        client = distributed.Client(address, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"no Dask scheduler at {address!r}: {error}", code="cluster.no-scheduler") from None
    with client:
        wanted = {path: token_of(path) for path in map(path_on_all, files) if not _URL.fullmatch(path)}
        answers = client.run(worker_sees, list(wanted), on_error="return")
        if not answers:
            raise UsageError(f"the Dask scheduler at {address!r} has no workers", code="cluster.no-workers")
        for worker, answer in answers.items():
            _check(worker, answer, wanted)
        yield Cluster(client, address, len(answers))


def path_on_all(path: str | Path) -> str:
    """The path that the workers are given: absolute, and a URL as it is."""
    text = str(path)
    return text if _URL.fullmatch(text) else os.path.abspath(text)


def worker_sees(paths: list[str]) -> dict[str, Any]:
    """What a worker is asked: its aprlab, and what it sees of these files."""
    return {"version": __version__, "files": {path: token_of(path) for path in paths}}


def token_of(path: str) -> str:
    """A file by its size and a CRC-32 of its ends, a folder by those of its files; a line that says why it cannot be read."""
    try:
        if os.path.isdir(path):
            inside = sorted(entry.name for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith("."))
            return ", ".join(f"{name}: {_ends(os.path.join(path, name))}" for name in inside)
        return _ends(path)
    except OSError as error:
        return f"not readable ({error.strerror})"


def _ends(path: str) -> str:
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(ENDS))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - ENDS))
        return f"{size} bytes, ends {zlib.crc32(file.read(ENDS), crc):08x}"


def _check(worker: str, answer: Any, wanted: dict[str, str]) -> None:
    """Refuse a worker that would compute something else."""
    if isinstance(answer, BaseException):
        says = f"has no aprlab {__version__} ({type(answer).__name__}: {answer})"
        raise UsageError(f"Dask worker {worker} {says:.300}", code="cluster.worker-without-aprlab")
    if answer["version"] != __version__:
        raise UsageError(
            f"Dask worker {worker} has aprlab {answer['version']}, this is {__version__}; install the same",
            code="cluster.version",
        )
    for path, here in wanted.items():
        if (there := answer["files"][path]) != here:
            short = [text if len(text) < 80 else f"{len(text.split(', '))} entries" for text in (there, here)]
            raise UsageError(
                f"Dask worker {worker} sees another file: {short[0]} there, {short[1]} here; all need it under this path",
                code="cluster.file", path=path,
            )  # fmt: skip


__all__ = ["Cluster", "connect", "path_on_all"]
