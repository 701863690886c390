"""`aprlab gpu`: what has to do with the kernels and a GPU. Mounted by `aprlab.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aprlab.errors import NumericError, UnsupportedError
from aprlab.formats.writing import write_json

app = typer.Typer(
    help="CUDA kernels: verify them on this machine's GPU, compile them, list them.",
    epilog="Example: aprlab gpu verify",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def verify(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")] = Path("gpu-verify.json"),
    device: Annotated[int, typer.Option(help="Number of the GPU.")] = 0,
) -> None:
    """Run every kernel on the GPU against its oracle, time the mat-vecs, write a JSON; status 1 if a case fails."""
    from aprlab.engines.cuda import CudaDevice
    from aprlab.kernels.cuda import verify as verification

    report = verification.report(CudaDevice(device=device))
    write_json(output, report)
    failed = [case["case"] for case in report["cases"] if not case["passed"]]
    count, name = len(report["cases"]), report["machine"]["device"]
    typer.echo(f"{count - len(failed)} of {count} cases passed on {name}; {output}")
    if failed:
        raise NumericError(f"{len(failed)} cases failed: {', '.join(failed)}")


@app.command(name="compile")
def compile_(
    arch: Annotated[int, typer.Option(help="Compute capability times ten, e.g. 80.")] = 80,
) -> None:
    """Compile the kernels with NVRTC (no GPU needed) and report registers and shared memory; status 1 if a gate fails."""
    from aprlab.kernels.cuda import compile as nvrtc
    from aprlab.kernels.cuda import static

    if arch not in nvrtc.architectures():
        raise UnsupportedError(f"compute capability {arch}: known are {', '.join(map(str, nvrtc.architectures()))}")
    found: list[str] = []
    for module in nvrtc.MODULES:
        compiled = nvrtc.compile_source(nvrtc.source(module), arch, machine_code=True)
        for entry, used in sorted(compiled.resources.items()):
            typer.echo(f"{entry:24} {used.registers:4} registers {used.shared:6} bytes shared {used.stack:4} bytes stack")
        found += static.findings(compiled)
    if found:
        raise NumericError("; ".join(found))


@app.command()
def faults() -> None:
    """List the kernel faults."""
    from aprlab.kernels.cuda.mutations import MUTATIONS

    for mutation in MUTATIONS.values():
        typer.echo(f"{mutation.name:24} {mutation.summary}")
