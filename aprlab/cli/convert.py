"""Panel "convert": files into other files, files from the hub, files of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aprlab.cli import output as out
from aprlab.cli.options import FaultIds, Source, Verbose, ids

if TYPE_CHECKING:
    from aprlab.conversion import ConversionReport


def convert(
    source: Source,
    output: Path,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Re-encode the 2-D weights: q4k, q6k, q8_0, f16, f32, …, or a mix: q4_k_m, …"),
    ] = None,
    dialect: Annotated[str, typer.Option(metavar="NAME", help="APR dialect: aprender or realizar.")] = "aprender",
    compress: Annotated[str | None, typer.Option(metavar="NAME", help="Compress the file: lz4 or zstd.")] = None,
    fault: FaultIds = None,
    verbose: Verbose = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Convert GGUF, APR or SafeTensors to APR, or to GGUF where OUT ends in .gguf; quantised blocks are copied as they are."""
    from aprlab.conversion import convert as run

    options: dict[str, Any] = {"quantize": quantize, "dialect": dialect, "compress": compress, "force": force}
    with _bytes_bar(source) as bar:
        if fault is None:
            report = run(source, output, progress=bar.update, **options)
        else:
            from aprlab.faults import convert_with

            report = convert_with(source, output, ids(fault), progress=bar.update, **options)
    _show_report(report, verbose, as_json)


def export(
    source: Source,
    output: Path,
    format: Annotated[
        str, typer.Option(metavar="NAME", help="gguf, or safetensors: a directory that transformers loads.")
    ] = "gguf",
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the weights in SafeTensors: f32 (exact), f16 or bf16.")
    ] = None,
    verbose: Verbose = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Export APR to GGUF, byte for byte the original where it came from one; or any model to SafeTensors."""
    from aprlab.conversion import export as run

    with _bytes_bar(source) as bar:
        report = run(source, output, format=format, dtype=dtype, force=force, progress=bar.update)
    _show_report(report, verbose, as_json)


def _bytes_bar(source: Path) -> Any:
    return out.progress(source.stat().st_size if source.is_file() else None, "B", source.name, scale=True)


def _show_report(report: ConversionReport, verbose: bool, as_json: bool) -> None:
    if as_json:
        out.say_json(report.to_json())
        return
    if verbose:
        rows = [
            (line.name, line.written_as, " × ".join(map(str, line.shape)), line.type_in, line.type_out, line.nbytes)
            for line in report.lines
        ]
        out.say_table("", ("tensor", "written as", "shape", "type in", "type out", "bytes"), rows, right=("bytes",))
    kinds = sorted({*report.types_in, *report.types_out})
    counts = [(kind, report.types_in.get(kind, 0), report.types_out.get(kind, 0)) for kind in kinds]
    totals = [("tensors", sum(report.types_in.values()), report.tensors), ("bytes", report.bytes_in, report.bytes_out)]
    title = f"{report.source} to {report.output} ({report.dialect}), {report.seconds:.2f} s"
    out.say_table(title, ("", "in", "out"), [*counts, *totals], right=("in", "out"))
    for line in report.notes:
        out.say(f"note: {line}")


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A known model, e.g. qwen2.5-coder-0.5b.", show_default=False)],
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Where to put it.", show_default="$APRLAB_MODELS or the cache"),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="The hub.", show_default="$HF_ENDPOINT or the public one")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Only look whether it is here.", show_default=False)] = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Fetch a known model from the Hugging Face hub (extra `hub`): resumes, and checks SHA-256."""
    from aprlab.model.hub import fetch as run

    done = run(name, folder=folder, endpoint=endpoint, offline=offline, force=force)
    if as_json:
        out.say_json(done.to_json())
    else:
        out.say(done.path)


def synth(
    like: Annotated[str, typer.Option(metavar="NAME", help="Tensors and shapes of this known model.", show_default=False)],
    output: Path,
    mix: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="q4_k_m or another mix, or one type for all matrices.")
    ] = "q4_k_m",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same file.")] = 0,
    tied: Annotated[
        bool | None,
        typer.Option("--tied/--separate", help="Without or with an output.weight.", show_default="as published"),
    ] = None,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Write a GGUF with a known model's true tensors, shapes and types and random weights."""
    from aprlab.conversion import synthetic
    from aprlab.published import known_model

    config = synthetic.config_of(known_model(like), tied=tied)
    total = sum(kind.nbytes(shape) for kind, shape in synthetic.inventory(config, mix).values())
    with out.progress(total, "B", output.name, scale=True) as bar:
        done = synthetic.synth(like, output, mix=mix, seed=seed, tied=tied, force=force, progress=bar.update)
    if as_json:
        out.say_json(done.to_json())
    else:
        kinds = ", ".join(f"{count} {name}" for name, count in done.by_type.items())
        out.say(f"{done.output}: {done.bytes} bytes, {kinds}, {done.bytes / done.seconds / 1e6:.0f} MB/s")
