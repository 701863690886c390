"""Seconds of each stage of a peel, a callback that follows it, and the seconds that a search may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from aprlab.onion.file_case import Deviation

Progress = Callable[[str, Sequence[Deviation] | None], None]
"""Called as each stage begins, with None, and as each layer of the files ends, with what it found."""


DEADLINE = 90.0  # seconds of runs in a search; then what is left is not tried, and the verdict says so


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


@dataclass
class Budget:
    """Seconds that a search by runs may take; what has begun when they are over is finished.

    The lesser of the clock's and the processor's counts: another process on the machine takes nothing away, nor do more threads.

    Attributes:
        seconds: at most.
        left_out: what was not done for want of time, each in words.
    """

    seconds: float
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    @property
    def spent(self) -> float:
        """Seconds until now."""
        clock, processor = self._began
        return min(time.perf_counter() - clock, time.process_time() - processor)

    @property
    def over(self) -> bool:
        """Whether nothing more may begin."""
        return self.spent >= self.seconds

    @property
    def in_words(self) -> str:
        """What was not done for want of time; empty where all was."""
        return f"the {self.seconds:g} s of the deadline were over: {'; '.join(self.left_out)}" if self.left_out else ""

    def leave_out(self, what: str) -> None:
        """Remember what was not done, once."""
        if what not in self.left_out:
            self.left_out.append(what)


__all__ = ["DEADLINE", "Budget", "Clock", "Progress"]
