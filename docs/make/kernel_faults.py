"""Print the table of what each kernel fault does to a model: `python docs/make/kernel_faults.py MODEL.gguf [FAULT …]`."""

from __future__ import annotations

import sys

from aprlab.forensics.kernel_faults import effects
from aprlab.formats import open_model


def main(path: str, *names: str) -> None:
    """Print the table, of these faults or of all."""
    print("| fault | tensors | wrong values | correlation | NaN or infinite | answer's tokens kept | says |")
    print("|---|---:|---:|---:|---:|---:|---|")
    with open_model(path) as model:
        for effect in effects(model, "What is 2+2?", names):
            said = effect.answer.replace("|", "\\|").replace("\n", "⏎")
            print(
                f"| {effect.name} | {effect.tensors} | {100 * effect.wrong:.2f} % | {effect.correlation:.4f} | "
                f"{100 * effect.broken:.2f} % | {effect.tokens} | `{said}` |",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
