"""The child: holds a model open and does one thing after another, so that a crash takes nothing else down."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from aprlab.errors import AprlabError, NumericError
from aprlab.paths import leave_with_parent

Request = dict[str, Any]
Reply = dict[str, Any]


def serve(link: Connection, errors: str, memory: int | None, bench: type[ChildOperations] | None = None) -> None:
    """Answer requests until the other end is gone.

    Args:
        link: requests in (``op`` and its arguments), replies out (``ok`` or ``error``/``kind``, and ``seconds``, ``cpu``).
        errors: a file for all that is printed.
        memory: most bytes of address space, None without a limit.
        bench: what does the work; for tests.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this process
    log = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    leave_with_parent()
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    hands = (bench or ChildOperations)()
    while True:
        try:
            request = link.recv()
        except EOFError:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        reply: Reply
        try:
            reply = {"ok": getattr(hands, "do_" + request.pop("op"))(**request)}
        except MemoryError:
            reply = {"error": "out of memory", "kind": "memory"}
        except AprlabError as error:
            reply = {"error": error.message, "kind": type(error).__name__}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "kind": "bug"}
        link.send(reply | {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu})


def _leave_with(parent: int) -> None:
    """End this process soon after its parent, where the system cannot (`leave_with_parent`)."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def peak() -> int:
    """Most bytes that this process ever had in memory, mapped pages of files included."""
    try:  # getrusage would give the parent's peak: it is inherited by fork and kept by exec
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class ChildOperations:
    """What a child can be asked to do; one method an operation."""

    def __init__(self) -> None:
        self.session: Any = None
        self.path = Path()

    def do_open(self, path: str, engine: str, threads: int | None) -> Reply:
        """Open a file and make a session; G0 and G1."""
        from aprlab.formats import open_model
        from aprlab.inference.session import Session

        model = open_model(path)
        self.path = Path(path)
        self.session = Session(model, engine=engine, threads=threads)
        return {"figures": {"load_seconds": self.session.load_seconds, "tensors": len(model.tensors)}}

    def do_load(self) -> Reply:
        """Every value is a number: block scales of all tensors are looked at."""
        self.session.model.check_values()
        return {"figures": {"load_seconds": self.session.load_seconds, "tensors": len(self.session.model.tensors)}}

    def do_ask(
        self, kind: str, prompt: Any, system: str | None, max_tokens: int, temperature: float, seed: int, stop: list[str]
    ) -> Reply:
        from aprlab.inference.session import Sampling

        answer = self.session.generate(
            prompt, raw=kind == "complete", system=system, max_tokens=max_tokens,
            sampling=Sampling(temperature, 1.0, seed), stop=stop,
        )  # fmt: skip
        return {"text": answer.text, "tokens": answer.tokens, "stop": answer.stop, "prompt_tokens": answer.prompt_tokens,
                "ends": sorted(self.session.tokenizer.eog)}  # fmt: skip

    def do_serial(self) -> Reply:
        """Logits of a prompt run together, and token by token: how far they are apart, at worst over positions.

        Raises:
            NumericError: they are not finite, or all zero at a position.
        """
        import numpy as np

        from aprlab.published import QUESTION
        from aprlab.tracing.traces import trace

        tokens = self.session.chat_tokens(QUESTION)[:8]
        together, single = (trace(self.session, tokens, "logits", chunk=chunk)["logits"].values for chunk in (None, 1))
        with np.errstate(all="ignore"):
            far = np.linalg.norm(together - single, axis=1) / np.linalg.norm(together, axis=1)
        if not np.isfinite(far).all():
            raise NumericError("the logits are not numbers, or all zero", code="qualification.logits-not-finite")
        return {"figures": {"relative_l2": float(far.max()), "tokens": len(tokens)}}

    def do_speed(self) -> Reply:
        """Tokens a second, of a prompt with its own system message (so that little of it is cached) and of the answer."""
        answer = self.session.generate("Count from 1 to 10.", system="You can count and do as you are told.", max_tokens=12)
        timing = {k: v for k, v in answer.timing.items() if v is not None}
        return {"figures": timing, "text": answer.text, "tokens": answer.tokens, "stop": answer.stop}

    def do_memory(self) -> Reply:
        """Peak memory of this process, by itself and beyond the size of the file."""
        size = sum(f.stat().st_size for f in (self.path.rglob("*") if self.path.is_dir() else [self.path]) if f.is_file())
        mib = 1 << 20
        return {"figures": {"peak_mib": peak() / mib, "file_mib": size / mib, "beyond_file_mib": (peak() - size) / mib}}

    # -- files ---------------------------------------------------------------------------------------------------

    def do_judge(self, name: str, answer: Reply, argument: Any, prompt: Any) -> Reply:
        """An oracle's word on an answer, which may be made to keep it busy: so it is asked in a process with limits."""
        from dataclasses import asdict

        from aprlab.qualification import oracles

        return {"word": asdict(oracles.judge(name, oracles.Answer(**answer), argument, prompt))}

    def do_convert(self, source: str, output: str, format: str) -> Reply:
        """A file into another format; SafeTensors as f32, so that no value changes."""
        make(source, output, format)
        return {}

    def do_pair(self, source: str, output: str, engine: str, threads: int | None, prompts: list[str], max_tokens: int) -> Reply:
        """A conversion against its real source: tokens, logits, inventory and every value."""
        import numpy as np

        from aprlab.formats import open_model
        from aprlab.inference.session import Session

        a, b = open_model(source), open_model(output)
        same = other = 0
        first = ""
        for name in sorted({*a.tensors, *b.tensors}):
            x, y = a.tensors.get(name), b.tensors.get(name)
            if x is not None and y is not None and x.shape == y.shape and _equal(x, y):
                same += 1
            else:
                other, first = other + 1, first or name
        sessions = [Session(m, engine=engine, threads=threads) for m in (a, b)]
        rows = []
        for prompt in prompts:
            expected, got = (s.generate(prompt, max_tokens=max_tokens, keep_logits=True) for s in sessions)
            before, after = expected.logits, got.logits
            assert before is not None
            assert after is not None  # they were asked for
            n = min(len(before), len(after))
            far = float(np.linalg.norm(before[:n] - after[:n]) / (np.linalg.norm(before[:n]) or 1))
            golden = all(getattr(expected, part) == getattr(got, part) for part in ("prompt_tokens", "tokens", "text", "stop"))
            rows.append({"prompt": prompt, "golden": golden, "texts": [expected.text, got.text], "tokens": len(expected.tokens),
                         "bitwise": bool(np.array_equal(before, after)), "relative_l2": far})  # fmt: skip
        return {"pair": {"same": same, "other": other, "first": first, "types": [a.by_type(), b.by_type()], "answers": rows}}

    def do_gates(self, ref: str, cand: str, engine: str, prompts: list[str], max_tokens: int, ids: list[str]) -> Reply:
        """Gates of the ticket on a converted file."""
        from aprlab import gates

        said = gates.run(ref, cand, engine=engine, prompts=prompts, max_tokens=max_tokens, ids=ids)
        return {"gates": [r.to_json() for r in said]}

    def do_peer(self, path: str, prompt: list[int], max_tokens: int) -> Reply:
        """What llama.cpp says to these ids, greedily, the end of text included: the five likeliest with log-probabilities."""
        import xllamacpp

        if self.path != Path(path):
            params = xllamacpp.CommonParams()
            params.model.path = path
            params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 1024, 1, 0, False
            params.cpuparams.n_threads, params.cpuparams_batch.n_threads, params.verbosity = 1, 1, -1
            self.session, self.path = xllamacpp.Server(params), Path(path)
        answer = self.session.handle_completions(
            {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 5, "cache_prompt": False}
        )
        steps = answer["choices"][0]["logprobs"]["content"]
        likely = [{str(t["id"]): t["logprob"] for t in s["top_logprobs"]} for s in steps]
        return {"tokens": [s["id"] for s in steps], "likely": likely}


def make(source: str | Path, output: str | Path, format: str) -> None:
    """Convert `source` into `format`; nothing is re-quantised, SafeTensors are written as f32."""
    from aprlab.conversion.converter import convert, export

    if format == "safetensors":
        export(source, output, format="safetensors", dtype="f32")
    elif format == "gguf" and not Path(source).is_dir():
        export(source, output)
    else:
        convert(source, output)


def _equal(x: Any, y: Any) -> bool:
    """The same values: by blocks where the type is kept, else decoded, some rows at a time."""
    import numpy as np

    if x.type is y.type:
        return bool(np.array_equal(x.raw, y.raw))
    if len(x.shape) == 1:
        return bool(np.array_equal(x.dequantise(), y.dequantise()))
    step = max(1, (1 << 24) // x.cols)
    return all(
        np.array_equal(x.dequantise(slice(at, at + step)), y.dequantise(slice(at, at + step))) for at in range(0, x.rows, step)
    )


Serve = Callable[[Connection, str, int | None], None]
__all__ = ["ChildOperations", "Serve", "make", "peak", "serve"]
