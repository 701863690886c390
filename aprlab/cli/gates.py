"""The verbs `gates`, `check`, `selftest`, `fingerprint` and `diff`; importing this adds them to `aprlab.cli.app`.

Exit status: 0 all is well; 1 two things differ, or an instrument lies; 2 bad input; 3 a gate or a stage says no; 4 a
gate can say nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aprlab.cli.app import Backend, Debug, Json, ModelFile, Tokens, _bar, _console, _ids, _print_json, _table, app
from aprlab.errors import UsageError

if TYPE_CHECKING:
    from aprlab.tracing.comparisons import Comparison

Reference = Annotated[Path, typer.Argument(metavar="REF", help="The file that is believed.", show_default=False)]
Candidate = Annotated[Path, typer.Argument(metavar="CAND", help="The file that is not.", show_default=False)]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="What both are asked; may be given again.", show_default=False)
]


@app.command(epilog="Example: aprlab gates model.gguf model.apr --backend jit")
def gates(
    ref: Reference,
    cand: Candidate,
    prompt: Prompts = None,
    max_tokens: Tokens = 12,
    backend: Backend = "reference",
    fault: Annotated[
        str | None, typer.Option("--fault", metavar="ID", help="Replace an instrument by a lying one.", show_default=False)
    ] = None,
    requantised: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="CAND was re-encoded to TYPE on purpose: `convert --quantize`.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Hold a converted file against its source: the six gates of the ticket, I-1 to I-5, and four more."""
    from aprlab import gates as module

    results = module.run(
        ref, cand, engine=backend, prompts=prompt or module.PROMPTS, max_tokens=max_tokens, replaced=_replaced(fault),
        requantised=requantised,
    )  # fmt: skip
    if as_json:
        _print_json(results.to_json())
    else:
        words = {True: "pass", False: "FAIL", None: "void"}
        rows = [(r.id, words[r.passed], r.figure, r.assertion) for r in results]
        _console().print(_table(f"{cand} against {ref}", ("gate", "", "measured", "asserts"), rows))
    if any(r.passed is False for r in results):
        return 3
    return 4 if any(r.passed is None for r in results) else 0


@app.command(epilog="Example: aprlab check model.apr")
def check(file: ModelFile, backend: Backend = "reference", as_json: Json = False, debug: Debug = False) -> int:
    """Look at one file in ten stages, from the tokenizer to the next word."""
    from aprlab.gates import ten_stages as module

    results = module.check(file, engine=backend)
    if as_json:
        _print_json(module.to_json(results))
    else:
        rows = [(n, r.name, "pass" if r.ok else "FAIL", r.detail) for n, r in enumerate(results, 1)]
        good, of = module.passed(results)
        _console().print(_table(f"{file}: {good}/{of}", ("", "stage", "", "found"), rows, right=("",)))
    return 0 if all(r.ok for r in results) else 3


@app.command(epilog="Example: aprlab selftest --fault order-blind-checksum")
def selftest(
    fault: Annotated[
        str | None, typer.Option("--fault", metavar="ID[,ID…]", help="Replace instruments by lying ones.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Show every instrument a known-equal and a known-different pair."""
    from aprlab.instruments.self_test import selftest as test

    results = test(_replaced(fault))
    if as_json:
        _print_json([asdict(r) for r in results])
    else:
        rows = [(r.name, "pass" if r.ok else "FAIL", r.detail) for r in results]
        _console().print(_table(f"{len(results)} instruments", ("instrument", "", "shown"), rows))
    return int(not all(r.ok for r in results))


def _replaced(listed: str | None) -> dict[str, Any]:
    """Instruments that faults of the catalogue stand in for."""
    from aprlab.faults import by_id

    chosen = [by_id(id) for id in _ids(listed or "")]
    for fault in chosen:
        if fault.instrument is None:
            raise UsageError(f"fault {fault.id!r} is no instrument's; give it to `convert` or `run`")
    return {fault.ruler: fault.instrument for fault in chosen}


@app.command(epilog="Example: aprlab fingerprint model.gguf model.apr")
def fingerprint(
    file: ModelFile,
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="Hold it against this one.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Hashes of every tensor's blocks and values beside their statistics; with OTHER, over the union of both."""
    from aprlab import instruments
    from aprlab.formats import open_model

    with open_model(file) as model:
        with _bar(file) as bar:
            prints = instruments.fingerprint(model, bar.update)
        if other is None:
            found = instruments.fingerprint_table(prints, str(file))
            matrix = next((t for t in model.tensors.values() if len(t.shape) == 2 and t.name.startswith("blk.")), None)
            turned = None if matrix is None else instruments.transposed_unseen(matrix)
            _show(found, as_json)
            if matrix is not None and turned is not None and not as_json:
                words = ", ".join(f"{what} {'sees it' if sees else 'blind'}" for what, sees in turned.items())
                print(f"{matrix.name} transposed: {words}")
            return 0
    with _bar(other) as bar:
        theirs = instruments.fingerprint(other, bar.update)
    return _show(instruments.compare_fingerprints(prints, theirs, f"{file} against {other}"), as_json)


@app.command(epilog="Example: aprlab diff model.gguf model.apr")
def diff(
    file: ModelFile,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The file to hold it against.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """What differs between two files: tensors of the union, config, tokenizer."""
    from aprlab import instruments

    found = instruments.diff(file, other)
    return _show(found, as_json, only_differing=True)


def _show(found: Comparison, as_json: bool, *, only_differing: bool = False) -> int:
    from aprlab.instruments.fingerprints import SCHEMA
    from aprlab.tracing.comparisons import format_cell

    if as_json:
        _print_json({"schema": SCHEMA, **found.to_dict()})
    else:
        rows = found.differing() if only_differing else found.rows
        if rows:
            cells = [[format_cell(row.get(c)) for c in found.columns] for row in rows]
            _console().print(_table(found.title, found.columns, cells))
        print(found.summary)
    return int(not found.equal)
