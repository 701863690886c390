"""Seconds of each stage of a peel, and a callback that follows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from aprlab.onion.file_case import Deviation

Progress = Callable[[str, Sequence[Deviation] | None], None]
"""Called as each stage begins, with None, and as each layer of the files ends, with what it found."""


class Clock(dict[str, float]):
    """Seconds by stage; `progress` is called when a stage begins."""

    def __init__(self, progress: Progress | None = None) -> None:
        super().__init__()
        self.progress: Progress = progress if progress is not None else lambda stage, found: None

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.progress(stage, None)
        started = time.perf_counter()
        try:
            yield
        finally:
            self[stage] = self.get(stage, 0.0) + time.perf_counter() - started
