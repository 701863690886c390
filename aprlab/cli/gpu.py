"""`aprlab gpu …`: the CUDA kernels, with a GPU and without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aprlab.cli import output as out
from aprlab.errors import NumericError, UnsupportedError


def verify(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="JSON file to write.")] = Path("gpu-verify.json"),
    device: Annotated[int, typer.Option(metavar="N", help="Number of the GPU.")] = 0,
) -> None:
    """Run every kernel on the GPU against its oracle, time the mat-vecs, write a JSON file."""
    from aprlab.engines.cuda import CudaDevice
    from aprlab.formats.writing import write_json
    from aprlab.kernels.cuda import verify as verification

    report = verification.report(CudaDevice(device=device))
    write_json(output, report)
    failed = [case["case"] for case in report["cases"] if not case["passed"]]
    count, name = len(report["cases"]), report["machine"]["device"]
    out.say(f"{count - len(failed)} of {count} cases passed on {name}; {output}")
    if failed:
        raise NumericError(f"{len(failed)} cases failed: {', '.join(failed)}", code="cli.kernel-cases-failed")


def compile_kernels(
    arch: Annotated[int, typer.Option(metavar="N", help="Compute capability times ten, e.g. 80.")] = 80,
) -> None:
    """Compile the kernels with NVRTC (no GPU needed); report registers, shared memory and stack."""
    from aprlab.kernels.cuda import compile as nvrtc
    from aprlab.kernels.cuda import static

    if arch not in nvrtc.architectures():
        raise UnsupportedError(
            f"compute capability {arch}: known are {', '.join(map(str, nvrtc.architectures()))}",
            code="cli.unknown-compute-capability",
        )
    found: list[str] = []
    rows: list[tuple[object, ...]] = []
    for module in nvrtc.MODULES:
        compiled = nvrtc.compile_source(nvrtc.source(module), arch, machine_code=True)
        rows += [(e, used.registers, used.shared, used.stack) for e, used in sorted(compiled.resources.items())]
        found += static.findings(compiled)
    columns = ("kernel", "registers", "bytes shared", "bytes stack")
    out.say_table(f"compute capability {arch}", columns, rows, right=columns[1:])
    if found:
        raise NumericError("; ".join(found), code="cli.kernel-gate")


def faults() -> None:
    """List the faults of the kernels."""
    from aprlab.kernels.cuda.mutations import MUTATIONS

    rows = [(mutation.name, mutation.summary) for mutation in MUTATIONS.values()]
    out.say_table(f"{len(rows)} faults", ("id", "what it does"), rows, prose=("what it does",))
