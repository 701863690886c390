"""Children that do what a test wants: answer, crash, hang, eat memory. In a module of their own, since each child imports it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

from aprlab.errors import NumericError
from aprlab.qualification import worker


class Stub(worker.ChildOperations):
    """No model at all: the prompt says what is to happen."""

    asked = 0

    def do_open(self, path: str, engine: str, threads: int | None) -> dict[str, Any]:
        if engine == "ptx":  # an engine that there is, and that no other test of a stub asks for
            os._exit(7)
        return {}

    def do_ask(self, kind: str, prompt: Any, **rest: Any) -> dict[str, Any]:
        type(self).asked += 1
        if prompt == "segfault":
            print("about to fall", flush=True)
            ctypes.string_at(0)
        if prompt == "exit":
            os._exit(3)
        if prompt == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "hang":
            time.sleep(60)
        if prompt == "eat":
            bytearray(1 << 36)
        if prompt == "nan":
            raise NumericError("step 0: 5 NaN among 9 logits", code="session.logits-not-finite")
        if prompt == "bug":
            raise ZeroDivisionError("division by zero")
        text = f"{prompt} {self.asked}" if prompt == "drift" else f"the answer to {prompt}"
        return {"text": text, "tokens": [len(text)], "stop": "eos", "prompt_tokens": [1, 2], "pid": os.getpid()}

    def do_load(self) -> dict[str, Any]:
        return {"figures": {"load_seconds": 0.25}}


def stub(link: Connection, errors: str, memory: int | None) -> None:
    """Serves `Stub`."""
    worker.serve(link, errors, memory, Stub)
