"""`aprlab ptx …`: run, profile, check and step anyone's PTX on a tensor of a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from aprlab.kernels.ptx.checks import KernelFinding
    from aprlab.kernels.ptx.tool import Job, KernelComparison, KernelRun

app = typer.Typer(
    name="ptx",
    help="Run anyone's PTX on the CPU and compare it with the right answer.",
    epilog="Example: aprlab ptx entries kernels.ptx",
    no_args_is_help=True,
    add_completion=False,
)

File = Annotated[Path, typer.Argument(metavar="FILE.ptx", help="PTX text, from any compiler.", show_default=False)]
Entry = Annotated[str, typer.Option("--entry", help="Kernel name (`aprlab ptx entries` lists them).", show_default=False)]
Grid = Annotated[
    str, typer.Option("--grid", help="Blocks: 1 to 3 expressions in rows, cols, elements, …; `/` rounds up.", show_default=False)
]
Block = Annotated[str, typer.Option("--block", help="Threads a block, likewise.")]
Args = Annotated[
    list[str],
    typer.Option(
        "--arg",
        help="One for each parameter, in order: weights, x[:f16|q8_0|q8_1], out[:f16], null, NAME:BYTES, rows, cols, … "
        "or NAME=NUMBER.",
        show_default=False,
    ),
]
ModelFile = Annotated[
    Path | None, typer.Option("--model", help="GGUF or APR file; the embedded model if omitted.", show_default=False)
]
TensorName = Annotated[str, typer.Option("--tensor", help="Which tensor.")]
Rows = Annotated[int, typer.Option("--rows", min=0, help="Only its first rows; 0: all.")]
Shared = Annotated[int, typer.Option("--shared", min=0, help="Dynamic shared memory, bytes.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the random activations.")]
Before = Annotated[
    list[str] | None,
    typer.Option("--before", help="A launch to make first: 'ENTRY;GRID;BLOCK;ARG ARG …'.", show_default=False),
]


def _job(
    file: File,
    entry: Entry,
    grid: Grid,
    args: Args,
    block: Block = "128",
    model: ModelFile = None,
    tensor: TensorName = "token_embd.weight",
    rows: Rows = 64,
    shared: Shared = 0,
    seed: Seed = 0,
    before: Before = None,
) -> Job:
    """What the commands below have in common: which kernel, launched how, on which tensor."""
    from aprlab import paths
    from aprlab.errors import UsageError
    from aprlab.formats import open_model
    from aprlab.kernels.ptx.tool import Job, PlannedLaunch, load

    steps = []
    for text in before or []:
        parts = text.split(";")
        if len(parts) != 4:
            raise UsageError(f"--before {text!r} is not ENTRY;GRID;BLOCK;ARGS")
        steps.append(PlannedLaunch(parts[0].strip(), parts[1], parts[2], tuple(parts[3].split())))
    steps.append(PlannedLaunch(entry, grid, block, tuple(args), shared))
    opened = open_model(model or paths.embedded_model())
    return Job(load(file), opened.tensor(tensor), steps, rows=rows, seed=seed)


def _launches(command: Callable[..., None]) -> Callable[..., None]:
    """A command that gets a job: on the command line `_job`'s options come first, then its own."""

    def run(**given: Any) -> None:
        command(_job(**{name: given.pop(name) for name in shared}), **given)

    shared, (_, *own) = _options(_job), _options(command).values()
    both = [*shared.values(), *own]
    update_wrapper(run, command)
    run.__signature__ = Signature(both)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in both}
    return run


def _options(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a function with their annotations worked out, which typer does only where it finds them itself."""
    hints = get_type_hints(function, localns={"Job": object}, include_extras=True)
    return {name: each.replace(annotation=hints[name]) for name, each in signature(function).parameters.items()}


def _print_comparison(comparison: KernelComparison) -> None:
    c = comparison
    if c.right:
        how = (
            "equal bit for bit"
            if c.operation == "dequantise"
            else f"largest difference {c.worst:.3g} = {c.relative:.2g} of the largest value"
        )
        typer.echo(f"{c.operation}: right: {c.values} values, {how}")
        return
    if c.unwritten:
        typer.echo(f"{c.operation}: WRONG: {c.unwritten} of {c.values} values were not written, or are NaN")
    if c.wrong:
        typer.echo(f"{c.operation}: WRONG: {c.wrong} of {c.values} values ({100 * c.wrong / c.values:.3g} %)")
        typer.echo(
            f"  worst at {list(c.at)}: {c.got:.9g}, right is {c.want:.9g}: "
            f"off by {c.worst:.3g} = {100 * c.relative:.3g} % of the largest value"
        )
        if c.operation == "matvec":
            typer.echo(f"  float32 rounding explains {c.allowed:.3g} there")


def _print_run(outcome: KernelRun) -> None:
    report = outcome.report
    _print_comparison(outcome.comparison)
    typer.echo(f"{report.warp_instructions} warp instructions, {report.thread_instructions} thread instructions")
    if not report.exact:
        names = sorted({report.instructions[pc].split()[0] for pc in report.approximate})
        typer.echo(f"approximate instructions ran ({', '.join(names)}): last bits may differ on a GPU")
    for note in report.notes:
        typer.echo(f"note: {note}")


def _print_findings(findings: list[KernelFinding]) -> None:
    for finding in findings:
        typer.echo(str(finding))
    typer.echo(f"{len(findings)} findings" if findings else "no findings: bounds, alignment, initialisation, races, barriers")


@app.command()
def entries(file: File) -> None:
    """List the kernels of a file, and whether the machine can run them."""
    from aprlab.kernels.ptx.tool import entries as list_entries
    from aprlab.kernels.ptx.tool import load

    for info in list_entries(load(file)):
        threads = f", at most {'×'.join(map(str, info.threads))} threads" if info.threads else ""
        state = (
            f"not supported: {info.unsupported}"
            if info.unsupported
            else f"{info.instructions} instructions, {info.shared_bytes} bytes shared"
        )
        typer.echo(f"{info.name}({', '.join(info.parameters)}): {state}{threads}")


@app.command()
@_launches
def run(job: Job) -> None:
    """Launch and compare with the right dequantisation or mat-vec; exit 1 if it is wrong."""
    from aprlab.kernels.ptx import tool

    outcome = tool.run(job)
    _print_run(outcome)
    raise typer.Exit(0 if outcome.comparison.right else 1)


@app.command()
@_launches
def check(job: Job) -> None:
    """Look for memory errors, races and divergent barriers; exit 1 if there are any, or the result is wrong."""
    from aprlab.kernels.ptx import tool

    outcome = tool.check(job)
    _print_findings(outcome.report.findings)
    _print_run(outcome)
    raise typer.Exit(0 if outcome.comparison.right and outcome.report.clean else 1)


@app.command()
@_launches
def profile(
    job: Job,
    source: Annotated[
        Path | None, typer.Option("--source", help="The .cu text, to print beside its lines.", show_default=False)
    ] = None,
) -> None:
    """Count instructions, sectors, bank wavefronts and DRAM bytes by source line."""
    from aprlab.kernels.ptx import tool

    outcome = tool.profile(job)
    report = outcome.report
    text = source.read_text(encoding="utf-8").splitlines() if source else []
    lines = report.by_line()
    only_one = len({line.file for line in lines if line.file}) == 1
    typer.echo(
        f"{'line':>30} {'warp instr.':>12} {'thread instr.':>14} {'requests':>9} {'sectors/req.':>12} {'wavefronts/req.':>15}"
    )
    for line in lines:
        name = f"{Path(line.file).name}:{line.line}" if line.file else "(no line)"
        per = f"{line.sectors / line.requests:12.2f} {line.wavefronts / line.requests:15.2f}" if line.requests else " " * 28
        ours = source is not None and (only_one or Path(line.file).name == source.name)
        shown = text[line.line - 1].strip() if ours and 0 < line.line <= len(text) else ""
        typer.echo(
            f"{name:>30} {line.warp_instructions:12} {line.thread_instructions:14} {line.requests or '':>9} "
            f"{per}  {shown}".rstrip()
        )
    assert report.counters is not None
    elements = job.sizes["elements"]
    typer.echo(
        f"{report.thread_instructions / elements:.3f} thread instructions a weight; "
        f"{report.counters.dram_bytes} bytes of DRAM at least"
    )
    _print_run(outcome)
    raise typer.Exit(0 if outcome.comparison.right else 1)


@app.command()
@_launches
def step(
    job: Job,
    number: Annotated[int, typer.Option("--block-number", min=0, help="Which block of the grid.")] = 0,
    warp: Annotated[int, typer.Option("--warp", min=0, help="Which warp of the block.")] = 0,
    by: Annotated[str, typer.Option("--by", help="line or instruction.")] = "line",
    count: Annotated[int, typer.Option("--count", min=1, help="How many steps to print.")] = 40,
    lane: Annotated[int, typer.Option("--lane", min=0, max=31, help="Whose values to print.")] = 0,
) -> None:
    """Print what one warp does, step by step: line, instruction, active lanes, registers that changed."""
    from aprlab.kernels.ptx import tool

    stepper = tool.step(job, block_number=number, warp=warp)
    for _ in range(count):
        view = stepper.view
        if view.finished:
            typer.echo("the warp has ended")
            break
        place = f"{Path(view.file).name}:{view.line}" if view.file else f"PTX line {view.ptx_line}"
        typer.echo(f"{place:>24} {sum(view.active):>2} lanes  {view.instruction}")
        stepper.step(by)
        values = {name: _lane(stepper.view.registers[name], lane) for name in stepper.view.changed}
        if values:
            typer.echo(" " * 26 + ", ".join(f"{name} = {value}" for name, value in list(values.items())[:12]))


def _lane(values: list[Any], lane: int) -> str:
    value = values[min(lane, len(values) - 1)]
    return f"{value:.9g}" if isinstance(value, float) else str(value)
