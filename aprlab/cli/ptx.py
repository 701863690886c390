"""`aprlab ptx …`: run, profile, check and step anyone's PTX on a tensor of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aprlab.cli import output as out
from aprlab.cli.registry import group
from aprlab.errors import UsageError

if TYPE_CHECKING:
    from aprlab.kernels.ptx.checks import KernelFinding
    from aprlab.kernels.ptx.tool import Job, KernelComparison, KernelRun

File = Annotated[Path, typer.Argument(metavar="FILE.ptx", help="PTX text, from any compiler.", show_default=False)]
Grid = Annotated[
    str,
    typer.Option(
        "--grid", metavar="EXPR", show_default=False,
        help="Blocks: 1 to 3 expressions in rows, cols, elements, …; `/` rounds up.",
    ),
]  # fmt: skip
Args = Annotated[
    list[str],
    typer.Option(
        "--arg", metavar="ARG", show_default=False,
        help="One for each parameter, in order: weights, x[:f16|q8_0|q8_1], out[:f16], null, NAME:BYTES, rows, cols, … "
        "or NAME=NUMBER.",
    ),
]  # fmt: skip
Before = Annotated[
    list[str] | None,
    typer.Option(
        "--before", metavar="LAUNCH", help="A launch to make first: 'ENTRY;GRID;BLOCK;ARG ARG …'.", show_default=False
    ),
]


@group("job")
def LAUNCH(
    file: File,
    entry: Annotated[
        str, typer.Option("--entry", metavar="NAME", help="Kernel, see `aprlab ptx entries`.", show_default=False)
    ],
    grid: Grid,
    args: Args,
    block: Annotated[str, typer.Option("--block", metavar="EXPR", help="Threads of a block, likewise.")] = "128",
    model: Annotated[
        Path | None, typer.Option("--model", metavar="FILE", help="GGUF or APR file.", show_default="the embedded model")
    ] = None,
    tensor: Annotated[str, typer.Option("--tensor", metavar="NAME", help="Which tensor.")] = "token_embd.weight",
    rows: Annotated[int, typer.Option("--rows", min=0, metavar="N", help="Only its first rows; 0: all.")] = 64,
    shared: Annotated[int, typer.Option("--shared", min=0, metavar="N", help="Dynamic shared memory, bytes.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the random activations.")] = 0,
    before: Before = None,
) -> dict[str, Any]:
    """Which kernel, launched how, on which tensor."""
    from aprlab import paths
    from aprlab.formats import open_model
    from aprlab.kernels.ptx.tool import Job, PlannedLaunch, load

    steps = []
    for text in before or []:
        parts = text.split(";")
        if len(parts) != 4:
            raise UsageError(f"--before {text!r} is not ENTRY;GRID;BLOCK;ARGS", code="cli.launch-of-four-parts")
        steps.append(PlannedLaunch(parts[0].strip(), parts[1], parts[2], tuple(parts[3].split())))
    steps.append(PlannedLaunch(entry, grid, block, tuple(args), shared))
    opened = open_model(model or paths.embedded_model())
    return {"job": Job(load(file), opened.tensor(tensor), steps, rows=rows, seed=seed)}


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
        out.say(f"{info.name}({', '.join(info.parameters)}): {state}{threads}")


def run(job: Job) -> int:
    """Launch a kernel and compare with the right dequantisation or mat-vec."""
    from aprlab.kernels.ptx import tool

    outcome = tool.run(job)
    _show_run(outcome)
    return 0 if outcome.comparison.right else 1


def check(job: Job) -> int:
    """Look for memory errors, races and divergent barriers."""
    from aprlab.kernels.ptx import tool

    outcome = tool.check(job)
    _show_findings(outcome.report.findings)
    _show_run(outcome)
    return 0 if outcome.comparison.right and outcome.report.clean else 1


def profile(
    job: Job,
    source: Annotated[
        Path | None, typer.Option("--source", metavar="FILE.cu", help="CUDA text, shown next to its lines.", show_default=False)
    ] = None,
) -> int:
    """Count instructions, sectors, bank wavefronts and DRAM bytes by source line."""
    from aprlab.kernels.ptx import tool

    outcome = tool.profile(job)
    report = outcome.report
    text = source.read_text(encoding="utf-8").splitlines() if source else []
    lines = report.by_line()
    only_one = len({line.file for line in lines if line.file}) == 1
    rows = []
    for line in lines:
        name = f"{Path(line.file).name}:{line.line}" if line.file else "(no line)"
        per = (f"{line.sectors / line.requests:.2f}", f"{line.wavefronts / line.requests:.2f}") if line.requests else ("", "")
        ours = source is not None and (only_one or Path(line.file).name == source.name)
        shown = text[line.line - 1].strip() if ours and 0 < line.line <= len(text) else ""
        rows.append((name, line.warp_instructions, line.thread_instructions, line.requests or "", *per, shown))
    counted = ("warp instr.", "thread instr.", "requests", "sectors/req.", "wavefronts/req.")
    out.say_table("", ("line", *counted, ""), rows, prose=("",), right=counted)
    assert report.counters is not None
    elements = job.sizes["elements"]
    out.say(
        f"{report.thread_instructions / elements:.3f} thread instructions a weight; "
        f"{report.counters.dram_bytes} bytes of DRAM at least"
    )
    _show_run(outcome)
    return 0 if outcome.comparison.right else 1


def step(
    job: Job,
    number: Annotated[int, typer.Option("--block-number", min=0, metavar="N", help="Which block of the grid.")] = 0,
    warp: Annotated[int, typer.Option("--warp", metavar="N", min=0, help="Which warp of the block.")] = 0,
    by: Annotated[str, typer.Option("--by", metavar="UNIT", help="line or instruction.")] = "line",
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="How many steps to print.")] = 40,
    lane: Annotated[int, typer.Option("--lane", metavar="N", min=0, max=31, help="The lane whose values to print.")] = 0,
) -> None:
    """Print what one warp does, step by step: line, instruction, active lanes, registers that changed."""
    from aprlab.kernels.ptx import tool

    stepper = tool.step(job, block_number=number, warp=warp)
    for _ in range(count):
        view = stepper.view
        if view.finished:
            out.say("the warp has ended")
            break
        place = f"{Path(view.file).name}:{view.line}" if view.file else f"PTX line {view.ptx_line}"
        out.say(f"{place:>24} {sum(view.active):>2} lanes  {view.instruction}")
        stepper.step(by)
        values = {name: _lane(stepper.view.registers[name], lane) for name in stepper.view.changed}
        if values:
            out.say(" " * 26 + ", ".join(f"{name} = {value}" for name, value in list(values.items())[:12]))


def _lane(values: list[Any], lane: int) -> str:
    value = values[min(lane, len(values) - 1)]
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _show_comparison(comparison: KernelComparison) -> None:
    c = comparison
    if c.right:
        how = (
            "equal bit for bit"
            if c.operation == "dequantise"
            else f"largest difference {c.worst:.3g} = {c.relative:.2g} of the largest value"
        )
        out.say(f"{c.operation}: right: {c.values} values, {how}")
        return
    if c.unwritten:
        out.say(f"{c.operation}: WRONG: {c.unwritten} of {c.values} values were not written, or are NaN")
    if c.wrong:
        out.say(f"{c.operation}: WRONG: {c.wrong} of {c.values} values ({100 * c.wrong / c.values:.3g} %)")
        out.say(
            f"  worst at {list(c.at)}: {c.got:.9g}, right is {c.want:.9g}: "
            f"off by {c.worst:.3g} = {100 * c.relative:.3g} % of the largest value"
        )
        if c.operation == "matvec":
            out.say(f"  float32 rounding explains {c.allowed:.3g} there")


def _show_run(outcome: KernelRun) -> None:
    report = outcome.report
    _show_comparison(outcome.comparison)
    out.say(f"{report.warp_instructions} warp instructions, {report.thread_instructions} thread instructions")
    if not report.exact:
        names = sorted({report.instructions[pc].split()[0] for pc in report.approximate})
        out.say(f"approximate instructions ran ({', '.join(names)}): last bits may differ on a GPU")
    for note in report.notes:
        out.say(f"note: {note}")


def _show_findings(findings: list[KernelFinding]) -> None:
    for finding in findings:
        out.say(str(finding))
    out.say(f"{len(findings)} findings" if findings else "no findings: bounds, alignment, initialisation, races, barriers")
