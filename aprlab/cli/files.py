"""The verbs `fetch` and `synth`; importing this adds them to `aprlab.cli.app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aprlab.cli.app import Debug, Force, Json, Output, _print_json, app


@app.command(epilog="Example: aprlab fetch qwen2.5-coder-0.5b")
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A known model, e.g. qwen2.5-coder-0.5b.", show_default=False)],
    folder: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="$APRLAB_MODELS or the cache without it.")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="The hub; $HF_ENDPOINT or the public one.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Only look whether it is here.", show_default=False)] = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a known model from the Hugging Face hub (extra `hub`): resumed, checked by SHA-256."""
    from aprlab.model.hub import fetch as run

    done = run(name, folder=folder, endpoint=endpoint, offline=offline, force=force)
    if as_json:
        _print_json(done.to_json())
    else:
        print(done.path)


@app.command(epilog="Example: aprlab synth --like qwen2.5-coder-7b --type q4_k_m -o big.gguf")
def synth(
    output: Output,
    like: Annotated[str, typer.Option(metavar="NAME", help="Inventory and shapes of this known model.", show_default=False)],
    mix: Annotated[str, typer.Option("--type", help="q4_k_m or another mix, or one type for all matrices.")] = "q4_k_m",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same file.")] = 0,
    tied: Annotated[
        bool | None, typer.Option("--tied/--separate", help="Without or with an output.weight; as published.", show_default=False)
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a GGUF of a known model's true inventory, shapes and types with random weights."""
    from tqdm import tqdm

    from aprlab.conversion import synthetic as module
    from aprlab.published import known_model

    config = module.config_of(known_model(like), tied=tied)
    total = sum(kind.nbytes(shape) for kind, shape in module.inventory(config, mix).values())
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None, desc=output.name) as bar:
        done = module.synth(like, output, mix=mix, seed=seed, tied=tied, force=force, progress=bar.update)
    if as_json:
        _print_json(done.to_json())
    else:
        kinds = ", ".join(f"{count} {name}" for name, count in done.by_type.items())
        print(f"{done.output}: {done.bytes} bytes, {kinds}, {done.bytes / done.seconds / 1e6:.0f} MB/s")
