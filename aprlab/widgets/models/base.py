"""What all view-models share: they say when they changed, and long work runs in the background and reports its progress.

No widget library is used here: a view-model is driven by a test, a script or a view alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from aprlab.errors import AprlabError, UsageError


class Stopped(Exception):
    """The work was asked to stop."""


class Observable:
    """Calls everyone who listens after each change, in the thread that made it."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[], None]] = []
        self.work = Work(self.changed)

    def listen(self, listener: Callable[[], None]) -> None:
        """`listener()` is called after each change."""
        self._listeners.append(listener)

    def changed(self) -> None:
        """Tell everyone."""
        for listener in list(self._listeners):
            listener()


class Work:
    """One piece of work at a time, in a thread of its own.

    Attributes:
        busy: it is under way.
        doing: what is being done, in words.
        done: how much of it, 0 to 1.
        error: why the last piece of work failed, in one line; empty if it did not.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.busy, self.doing, self.done, self.error = False, "", 0.0, ""

    def free(self) -> None:
        """Raises UsageError while something is under way."""
        if self.busy:
            raise UsageError(f"still busy: {self.doing}", code="widgets.busy")

    def start(self, what: str, job: Callable[[], None]) -> None:
        """Run `job()` in the background; raises UsageError while another is under way.

        An error of this library is kept as one line; any other too, with its class: a widget has no stack to show.
        """
        self.free()
        self.busy, self.doing, self.done, self.error = True, what, 0.0, ""
        self._stop.clear()
        try:
            self._changed()
        except BaseException:  # a listener's: nothing has begun
            self.busy, self.doing = False, ""
            raise

        def run() -> None:
            try:
                job()
            except Stopped:
                self.error = "stopped"
            except AprlabError as error:
                self.error = str(error)
            except Exception as error:
                self.error = f"{type(error).__name__}: {error}"
            finally:
                self.busy, self.doing, self.done = False, "", 1.0
                self._changed()

        self._thread = threading.Thread(target=run, name="aprlab widget", daemon=True)
        self._thread.start()

    def tell(self, doing: str, done: float) -> None:
        """Called by the job: what it does now and how far it is; ends the job if it was asked to stop."""
        if self._stop.is_set():
            raise Stopped
        self.doing, self.done = doing, min(max(done, 0.0), 1.0)
        self._changed()

    def stop(self) -> None:
        """Ask the job to end at its next word."""
        self._stop.set()

    def wait(self, seconds: float = 600) -> None:
        """Until the work has ended; raises TimeoutError where it has not."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                raise TimeoutError(self.doing)


__all__ = ["Observable", "Stopped", "Work"]
