"""Engine jit against llama.cpp: decode, prompts, memory and start on a real model; interleaved, each in its own process.

    python benchmarks/bench_engine.py MODEL.gguf [--threads 2] [--rounds 5] [--peer llama_cpp] [--context 0]

Contenders: jit with contract f32, jit with contract q8, llama.cpp through `llama_cpp` (extra `bench`, built here) or
`xllamacpp` (extra `peer`, a wheel). Every contender is a worker process that stays alive and idle while another one runs;
rounds go around. A round is one prompt of each length, then `--tokens` tokens decoded greedily behind a prompt of 16, or
of `--context` where one is given. Before the first round each decodes two tokens, so that neither page faults nor jit's
repacking of weights fall into one. Prints Markdown: medians with spread, ratios round by round, and processor time, which
says something on a busy machine, too. Run it on a quiet one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", default="36,128,512")
    parser.add_argument("--context", type=int, default=0, help="decode behind so many tokens")
    parser.add_argument("--peer", choices=("llama_cpp", "xllamacpp"), default="llama_cpp")
    parser.add_argument("--only", help="contenders, e.g. q8,peer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    names = options.only.split(",") if options.only else ["f32", "q8", "peer"]
    workers = {name: Worker(name) for name in names}
    prompts = [int(n) for n in options.prompts.split(",") if n]
    jobs: list[tuple[str, dict[str, int]]] = [(f"prompt {n}", {"prompt": n}) for n in prompts]
    behind = options.context or 16
    jobs.append((f"decode {options.tokens} at {behind}", {"context": behind, "tokens": options.tokens}))
    results: dict[str, dict[str, list[Result]]] = {label: {name: [] for name in names} for label, _ in jobs}
    for round_ in range(options.rounds):
        order = names[round_ % len(names) :] + names[: round_ % len(names)]
        for label, job in jobs:
            for name in order:
                results[label][name].append(workers[name].ask(job))
    blas, load = os.environ.get("OPENBLAS_CORETYPE", "unset"), os.getloadavg()[0]
    print(f"`{options.model.name}`, {options.threads} threads, {options.rounds} rounds, peer {options.peer}, "
          f"load average {load:.1f}, OPENBLAS_CORETYPE {blas}\n")  # fmt: skip
    others = [name for name in names if name != "peer" and "peer" in names]
    heads = ["", *(f"{name}, tokens/s" for name in names), *(f"{name} / peer" for name in others),
             *(f"{name}, CPU ms a token" for name in names)]  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for label, runs in results.items():
        cells = [spread([run.speed for run in runs[name]]) for name in names]
        for name in others:
            cells.append(spread([a.speed / b.speed for a, b in zip(runs[name], runs["peer"], strict=True)]))
        cells += [f"{statistics.median(run.processor for run in runs[name]):.1f}" for name in names]
        print(f"| {label} | {' | '.join(cells)} |")
    print("\n| | first token of a prompt of 36, s | CPU s until then | resident at most, MB |\n|---|---|---|---|")
    for name, worker in workers.items():
        print(f"| {name} | {worker.start:.2f} | {worker.start_processor:.2f} | {worker.close():.0f} |")


@dataclass(frozen=True)
class Result:
    """Tokens a second, and milliseconds of processor time a token."""

    speed: float
    processor: float


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


class Worker:
    """A contender in a process of its own, told what to do by lines of JSON."""

    def __init__(self, name: str) -> None:
        started = time.perf_counter()
        command = [sys.executable, *sys.argv, "--worker", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask({"prompt": 36})
        self.start = time.perf_counter() - started
        self.start_processor = self.ask({"clock": 1}).speed
        self.ask({"context": 16, "tokens": 2})

    def ask(self, job: dict[str, int]) -> Result:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        while line := self.process.stdout.readline():
            if line.startswith("result "):
                return Result(*map(float, line.split()[1:]))
        raise RuntimeError("a worker died")

    def close(self) -> float:
        peak = self.ask({}).speed
        self.process.terminate()
        self.process.wait()
        return peak


def work(options: argparse.Namespace) -> None:
    """Answer each line of standard input with tokens a second, or with peak resident megabytes for an empty job."""
    size = max(options.context, 16, *(int(n) for n in options.prompts.split(",") if n)) + options.tokens + 64
    if options.worker == "peer":
        contender: Any = {"llama_cpp": LlamaCpp, "xllamacpp": XLlamaCpp}[options.peer](options, size)
    else:
        contender = Jit(options, size)
    for line in sys.stdin:
        job = json.loads(line)
        if "tokens" in job:
            print("result", *contender.decode(job["context"], job["tokens"]), flush=True)
        elif "prompt" in job:
            print("result", *contender.prompt(job["prompt"]), flush=True)
        elif "clock" in job:
            print("result", time.process_time(), 0, flush=True)
        else:
            peak = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
            print("result", int(peak.split()[1]) / 1000, 0, flush=True)


class Clock:
    """Started when made; `per` tells tokens a second and processor milliseconds a token since then."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def per(self, tokens: int) -> tuple[float, float]:
        wall, processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        return tokens / wall, 1e3 * processor / tokens


def ids(count: int) -> list[int]:
    """Ordinary tokens, always the same."""
    return [1000 + (37 * i) % 20000 for i in range(count)]


class Jit:
    def __init__(self, options: argparse.Namespace, size: int) -> None:
        from aprlab import engines
        from aprlab.formats import open_model

        self.model = open_model(options.model)
        self.engine = engines.create("jit", self.model, options.threads, contract=options.worker)
        self.engine.warm()  # as a session does
        self.config = self.model.config
        self.cache = self.engine.new_cache(self.config, size)
        self.fed = self.next = 0

    def feed(self, tokens: list[int]) -> int:
        from aprlab.architectures.qwen2 import forward

        logits = forward(self.engine, self.config, tokens, self.cache, last_only=True)
        return int(self.engine.to_numpy(logits)[-1].argmax())

    def prompt(self, count: int) -> tuple[float, float]:
        self.cache.truncate(0)
        self.fed = 0
        clock = Clock()
        self.feed(ids(count))
        return clock.per(count)

    def decode(self, context: int, count: int) -> tuple[float, float]:
        if self.fed != context:  # a long context is read once and decoded behind many times
            self.cache.truncate(0)
            self.fed, self.next = context, self.feed(ids(context))
        self.cache.truncate(context)
        token = self.next
        clock = Clock()
        for _ in range(count):
            token = self.feed([token])
        return clock.per(count)


class LlamaCpp:
    """llama-cpp-python, by its low-level calls: no sampling, no Python per logit."""

    def __init__(self, options: argparse.Namespace, size: int) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(
            str(options.model), n_ctx=size, n_threads=options.threads, n_threads_batch=options.threads,
            n_batch=512, logits_all=False, verbose=False,
        )  # fmt: skip
        self.fed = self.next = 0

    def feed(self, tokens: list[int]) -> int:
        import numpy as np

        self.llama.eval(tokens)
        pointer = self.llama._ctx.get_logits()
        return int(np.ctypeslib.as_array(pointer, shape=(self.llama.n_vocab(),)).argmax())

    def prompt(self, count: int) -> tuple[float, float]:
        self.llama.reset()
        self.fed = 0
        clock = Clock()
        self.feed(ids(count))
        return clock.per(count)

    def decode(self, context: int, count: int) -> tuple[float, float]:
        if self.fed != context:
            self.llama.reset()
            self.fed, self.next = context, self.feed(ids(context))
        self.llama.n_tokens = context  # `eval` drops what the cache holds behind it
        token = self.next
        clock = Clock()
        for _ in range(count):
            token = self.feed([token])
        return clock.per(count)


class XLlamaCpp:
    """llama.cpp's server inside xllamacpp, by its own clock (`timings` of a completion)."""

    def __init__(self, options: argparse.Namespace, size: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(options.model)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = size, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: int, count: int) -> dict[str, Any]:
        request = {
            "prompt": ids(prompt), "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
        }  # fmt: skip
        answer = self.server.handle_completions(request)
        return dict((json.loads(answer) if isinstance(answer, str | bytes) else answer)["timings"])

    def prompt(self, count: int) -> tuple[float, float]:
        clock = Clock()
        told = self.complete(count, 1)
        return float(told["prompt_per_second"]), clock.per(count)[1]

    def decode(self, context: int, count: int) -> tuple[float, float]:
        clock = Clock()
        told = self.complete(context, count + 1)  # the prompt is in the processor time, too
        return float(told["predicted_per_second"]), clock.per(count)[1]


if __name__ == "__main__":
    main()
