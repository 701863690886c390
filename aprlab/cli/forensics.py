"""The verb `forensics`: someone pasted garbage into a bug report; which fault says that?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)
voices_app = typer.Typer(add_completion=False)


@app.command(epilog="Example: aprlab forensics model.gguf --saw '3,}, helf helf.How helf' --pairs")
def forensics(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A healthy GGUF or APR file.", show_default=False)],
    saw: Annotated[str, typer.Option("--saw", metavar="TEXT", help="What the broken model said.", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What it had been asked.")] = "What is 2+2?",
    raw: Annotated[bool, typer.Option("--raw", help="It was asked without the chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt it had.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also try pairs: each of the best with every other.")] = False,
    depth: Annotated[int | None, typer.Option("--depth", min=1, max=5, help="Sets of up to so many faults.")] = None,
    width: Annotated[int, typer.Option("--width", min=1, help="How many of the best sets grow.")] = 4,
    only: Annotated[str | None, typer.Option("--only", metavar="ID,ID+ID", help="Try these faults or sets of them only.")] = None,
    backend: Annotated[str, typer.Option("--backend", "-b", metavar="ENGINE", help="Engine: reference, jit, …")] = "jit",
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="CPU threads.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many rows to print.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)] = False,
) -> None:
    """Rank faults by how well they explain a garbage answer."""
    from tqdm import tqdm

    from aprlab.faults import run_faults
    from aprlab.forensics.answer_scoring import Suspect
    from aprlab.forensics.ranking import forensics as search

    chosen = None if only is None else [id.strip() for id in only.split(",") if id.strip()]
    rounds = depth if depth is not None else 2 if pairs else 1
    count = len(chosen if chosen is not None else run_faults())
    with tqdm(total=count * (1 + width * (rounds - 1)), disable=None, leave=False, desc="faults") as bar:

        def show(suspect: Suspect) -> None:
            bar.set_postfix_str(" + ".join(suspect.faults))
            bar.update()

        found = search(
            file, saw, prompt=prompt, raw=raw, system=system, depth=rounds, width=width, faults=chosen,
            engine=backend, threads=threads, progress=show,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=1))
        return
    print(f"saw      {found.saw!r}  {found.saw_tokens}")
    print(f"healthy  {found.healthy.text!r}")
    for faults, score, text, why in found.rows(top):
        print(f"{score}  {faults:44} {text}\n      {why}")
    failed = sum(s.match is None for s in found.suspects)
    if failed:
        print(f"{failed} of {len(found.suspects)} sets could not run (refused or not a number)", file=sys.stderr)
    print(found.conclusion)


@voices_app.command(epilog="Example: aprlab voices model.gguf --json > signatures.json")
def voices(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A healthy GGUF or APR file.", show_default=False)],
    prompts: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Ask this; give it twice or more.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Length of each answer.")] = 12,
    backend: Annotated[str, typer.Option("--backend", "-b", metavar="ENGINE", help="Engine: reference, jit, …")] = "jit",
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="CPU threads.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Rank by the likelihood of the texts, too (slow).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)] = False,
) -> None:
    """What the model says under every fault, and how well each fault is known again by another answer."""
    from tqdm import tqdm

    from aprlab.faults import run_faults
    from aprlab.forensics.signatures import PROMPTS, fault_signatures

    with tqdm(total=len(run_faults()), disable=None, leave=False, desc="faults") as bar:
        found = fault_signatures(
            file, prompts or PROMPTS, max_tokens=max_tokens, follow=follow, engine=backend, threads=threads,
            progress=lambda id: bar.update(),
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=1))
        return
    for id, texts in {"(healthy)": found.healthy, **found.said}.items():
        print(f"{id:24}", "  |  ".join(map(repr, texts)))
    for id, reason in found.why_not.items():
        print(f"{id:24} could not run: {reason}", file=sys.stderr)
    print(f"silent on these prompts: {', '.join(found.silent) or 'none'}")
    print(f"known again by another answer: {found.top1:.0%} first, {found.top3:.0%} among the first three, of {found.counted}")
