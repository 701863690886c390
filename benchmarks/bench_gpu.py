"""A GPU in one go, in at most six minutes: bits, bandwidth, decode and prompts; the record is JSON for `benchmarks/gpu/`.

    python benchmarks/bench_gpu.py [--output OUT.json] [--device 0] [--models qwen2.5-coder-0.5b,qwen2.5-coder-1.5b]
    python benchmarks/bench_gpu.py --rehearse     # the same steps on the PTX machine: small, slow, and no GPU needed

1. Every kernel against its oracle and, bit for bit, against what the PTX machine gave (`aprlab.kernels.cuda.verify`).
2. A copy on the device, which is the roofline; mat-vecs of one token by type and contract over the matrices of the models.
3. The embedded model's logits against the PTX machine's, bit for bit; then prompts and decoding of the models, under both
   contracts, with the load line. A model that is not here is replaced by a synthetic one of its size, and the record says so.

Each step stands in the record as soon as it is done, so that a run that is cut off has lost only what it had not begun.
`python docs/make/kernel_costs.py` puts the mat-vecs of 1536 x 8960 into the last column of the table in docs/kernels.md.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from aprlab import paths
from aprlab.architectures import forward
from aprlab.conversion.synthetic import synth
from aprlab.engines.cuda import CudaDevice, CudaEngine
from aprlab.engines.kernel_engine import KernelEngine
from aprlab.engines.ptx import PtxDevice, PtxEngine
from aprlab.formats import open_model
from aprlab.formats.writing import write_json
from aprlab.inference.session import Session
from aprlab.kernels.cuda import verify
from aprlab.kernels.cuda.launch import Launch
from aprlab.model.model import Model
from aprlab.published import known_model
from aprlab.version import __version__

SHAPES = ((8960, 1536), (1536, 8960), (1536, 1536), (4864, 896), (896, 4864), (151_936, 896), (151_936, 1536))
SMALL, SMALL_BYTES = ((64, 512), (32, 96)), 1 << 16
PROMPT = [151644, 872, 198, 3838, 374, 220, 17, 488, 220, 17, 30, 151645]  # ids of any Qwen2; taken modulo a vocabulary


class RehearsalDevice(PtxDevice):
    """The PTX machine with a GPU's further methods; its seconds are this processor's."""

    def seconds(self, *launches: Launch, rounds: int = 1) -> float:
        """Mean wall time of a launch."""
        started = time.perf_counter()
        for launch in launches:
            self.run(launch)
        return (time.perf_counter() - started) / len(launches)

    def describe(self) -> dict[str, Any]:
        """Said plainly: no GPU."""
        return {"device": "none: a rehearsal on the PTX machine", "processor": platform.processor() or platform.machine()}


def copy_rate(device: Any, rehearsal: bool) -> dict[str, float]:
    """Bytes a second read and written by a copy on the device: what no kernel that reads its weights once can beat."""
    size = 1 << 24 if rehearsal else 1 << 30
    if rehearsal:
        source, target = np.zeros(size, np.uint8), np.empty(size, np.uint8)
        started = time.perf_counter()
        np.copyto(target, source)
        seconds = time.perf_counter() - started
    else:
        cupy = device.cupy
        source, target = cupy.zeros(size, cupy.uint8), cupy.empty(size, cupy.uint8)
        seconds = float("inf")
        for _ in range(5):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            target[:] = source
            end.record()
            end.synchronize()
            seconds = min(seconds, cupy.cuda.get_elapsed_time(start, end) / 1e3)
    return {"bytes": float(size), "seconds": seconds, "bytes_a_second": 2 * size / seconds}


def tiny_logits(make: Callable[[Model, str], KernelEngine]) -> dict[str, str]:
    """XXH3-64 of the embedded model's logits after a prompt and one step, by contract."""
    found = {}
    for contract in ("f32", "q8"):
        engine = make(open_model(paths.embedded_model()), contract)
        config = engine.model.config
        ids = [id % config.vocab_size for id in PROMPT]
        cache = engine.new_cache(config, 32)
        logits = [engine.to_numpy(forward(engine, config, part, cache)) for part in (ids, ids[:1])]
        found[contract] = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(np.concatenate(logits)).view(np.uint8).data)
        engine.close()
    return found


def model_at(name: str, folder: str) -> tuple[Path, bool]:
    """The published file, or a synthetic one of the same inventory; whether it is the published one."""
    path = paths.models_dir() / known_model(name).file
    if path.is_file():
        return path, True
    made = Path(folder) / f"{name}.gguf"
    synth(name, made)
    return made, False


def speed(path: Path, make: Callable[[Model, str], KernelEngine], tokens: int, prompts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Prompts and decoding, tokens a second, under both contracts."""
    rows = []
    for contract in ("f32", "q8"):
        session = Session(make(open_model(path), contract))
        engine, config = session.engine, session.config
        ids = [id % config.vocab_size for id in (PROMPT * (max(prompts) // len(PROMPT) + 1))]
        row: dict[str, Any] = {"contract": contract, "load_line": engine.load_line(), "load_seconds": session.load_seconds}
        for length in (prompts[0], *prompts):  # the first one uploads and compiles, and is written over
            started = time.perf_counter()
            logits = engine.to_numpy(forward(engine, config, ids[:length], engine.new_cache(config, 1024), last_only=True))
            row[f"prompt_{length}"] = length / (time.perf_counter() - started)
        cache, answer = engine.new_cache(config, 1024), []
        logits = engine.to_numpy(forward(engine, config, ids[: prompts[0]], cache, last_only=True))
        started = time.perf_counter()
        for _ in range(tokens):
            answer.append(int(logits[-1].argmax()))
            logits = engine.to_numpy(forward(engine, config, answer[-1:], cache, last_only=True))
        row |= {"decode": tokens / (time.perf_counter() - started), "tokens": tokens, "answer": answer[:16]}
        rows.append(row)
        engine.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--models", default="qwen2.5-coder-0.5b,qwen2.5-coder-1.5b")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    output = options.output or Path("gpu-rehearsal.json" if options.rehearse else "gpu.json")
    started = time.perf_counter()
    record: dict[str, Any] = {
        "schema": 1, "rehearsal": options.rehearse, "aprlab": __version__, "python": platform.python_version(),
        "numpy": np.__version__, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": {},
    }  # fmt: skip

    def step(name: str, action: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        try:
            record[name] = action()
        except Exception as error:  # the next step may still work, and this device may not come back
            record[name] = {"failed": f"{type(error).__name__}: {error}"}
        record["seconds"][name] = round(time.perf_counter() - begun, 2)
        write_json(output, record)
        print(f"{time.perf_counter() - started:6.1f} s  {name}", flush=True)
        return record[name]

    if options.rehearse:
        verify.TIMED_BYTES = SMALL_BYTES
        device: Any = RehearsalDevice()
        make: Callable[[Model, str], KernelEngine] = lambda model, contract: PtxEngine(model, contract=contract)  # noqa: E731
    else:
        device = CudaDevice(device=options.device)
        make = lambda model, contract: CudaEngine(model, contract=contract, device=options.device)  # noqa: E731
    step("machine", device.describe)
    cases = step("cases", lambda: verify.verify(device))
    step("copy", lambda: copy_rate(device, options.rehearse))
    step("matvecs", lambda: verify.timings(device, SMALL if options.rehearse else SHAPES))
    step("embedded_logits", lambda: {"here": tiny_logits(make), "ptx": tiny_logits(lambda m, c: PtxEngine(m, contract=c))})
    with tempfile.TemporaryDirectory() as folder:
        if options.rehearse:
            step("embedded", lambda: speed(paths.embedded_model(), make, 3, (4, 12)))
        else:
            for name in options.models.split(","):
                path, published = model_at(name, folder)
                step(name, lambda: {"published": published, "runs": speed(path, make, 128, (36, 128, 512))})  # noqa: B023
    tell(record, cases)


def tell(record: dict[str, Any], cases: Any) -> None:
    """The record in a few lines of Markdown."""
    if isinstance(cases, list):
        bits = [case["as_the_machine"] for case in cases]
        print(f"{sum(case['passed'] for case in cases)} of {len(cases)} cases passed; bit for bit as on the PTX machine: "
              f"{bits.count(True)}, others {bits.count(False)}, not compared {bits.count(None)}")  # fmt: skip
    logits = record["embedded_logits"]
    print("the embedded model's logits are the PTX machine's:", "here" in logits and logits["here"] == logits["ptx"])
    roof = record["copy"].get("bytes_a_second", float("nan"))
    print(f"\ncopy: {roof / 1e9:.0f} GB/s read and written\n")
    print("| type | contract | rows x cols | µs | GB/s | of the copy |\n|---|---|---|---|---|---|")
    for row in record["matvecs"] if isinstance(record["matvecs"], list) else []:
        print(f"| {row['type']} | {row['contract']} | {row['rows']} x {row['cols']} | {1e6 * row['seconds']:.1f} "
              f"| {row['bytes_a_second'] / 1e9:.0f} | {100 * row['bytes_a_second'] / roof:.0f} % |")  # fmt: skip
    for name, found in record.items():
        runs = found.get("runs", []) if isinstance(found, dict) else found if name == "embedded" else []
        for run in runs:
            prompts = ", ".join(f"{key[7:]}: {value:.0f}" for key, value in run.items() if key.startswith("prompt_"))
            print(f"\n{name}, {run['contract']}: {run['load_line']}; prompts {prompts}; decode {run['decode']:.1f} tokens/s")


if __name__ == "__main__":
    main()
