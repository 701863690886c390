"""Many calls of one function, in processes of this machine or on a Dask cluster: what `--jobs` and `--scheduler` mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from aprlab import cluster
from aprlab.errors import AprlabError, UsageError
from aprlab.paths import cores, leave_with_parent

T = TypeVar("T")
R = TypeVar("R")
THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def threads_each(jobs: int) -> int:
    """Threads for each of so many processes, so that together they use the processor once."""
    return max(1, cores() // jobs)


def check_jobs(jobs: int) -> None:
    """Raises UsageError for a number of processes below 1."""
    if jobs < 1:
        raise UsageError(f"jobs {jobs}: at least 1 is needed", code="workers.jobs")


def results(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    files: Sequence[str | Path] = (),
    names: Sequence[str] | None = None,
) -> Iterator[R]:
    """`function` of each item, as they end; in order where this process does them all.

    Args:
        function: of a module, so that another process can import it; items and results can be pickled.
        items: the first are started first.
        jobs: processes at a time on this machine; the libraries of each are told to use their share of the processor.
        scheduler: address of a Dask scheduler whose workers do it instead, see `aprlab.cluster`.
        files: what its workers must see under the same path.
        names: of the items, for the cluster's own pages.

    Raises:
        UsageError: `jobs` below 1, or something is wrong with the cluster.
        AprlabError: a process was killed from outside. What the function raises comes through.
    """
    check_jobs(jobs)
    if scheduler is not None:
        with cluster.connect(scheduler, files) as workers:
            yield from (result for _, result in workers.each(function, items, names))
    elif jobs == 1 or len(items) < 2:
        yield from map(function, items)
    else:
        yield from _in_processes(function, items, jobs)


def _in_processes(function: Callable[[T], R], items: Sequence[T], jobs: int) -> Iterator[R]:
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(), threads_each(jobs))
    ) as pool:
        try:
            futures: list[Future[R]] = [pool.submit(function, item) for item in items]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise AprlabError("a worker process was killed; run again to go on from here", code="workers.killed") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int, threads: int) -> None:
    """In a new process, before anything heavy is imported."""
    leave_with_parent(parent)
    os.environ.update(dict.fromkeys(THREAD_LIMITS, str(threads)))
