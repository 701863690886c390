"""Run the notebooks again in place and redraw the README's figure: `python docs/make/refresh.py [NOTEBOOK…]`.

Outputs are committed because nbval compares with them; timings, ids and versions are left out, so that a second run
changes nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from matplotlib import pyplot as plt
from nbclient import NotebookClient

import aprlab
from aprlab import figures, paths
from aprlab.published import QUESTION
from aprlab.tracing import comparisons

DOCS = Path(__file__).resolve().parents[1]


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs of a cell with neighbouring pieces of one stream joined: a slow machine cuts them in other places."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = whole[-1] if whole else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            whole.append(output)
    return whole


def run_in_place(path: Path) -> None:
    """Execute with the defaults; keep outputs and counts, drop what differs from run to run."""
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, kernel_name="python3", record_timing=False, timeout=600).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


def golden_rule_figure(path: Path) -> None:
    """The embedded model as GGUF and as APR: bytes by type, and the stream after each layer."""
    converted = path.with_suffix(".apr")
    try:
        aprlab.convert(aprlab.embedded_model(), converted, force=True)
        models = {"GGUF": aprlab.open_model(aprlab.embedded_model()), "APR": aprlab.open_model(converted)}
        traces = {label: aprlab.trace(model, QUESTION) for label, model in models.items()}
        assert aprlab.compare(traces["GGUF"], traces["APR"]).equal, "the caption below would be a lie"
        rows = {label: comparisons.layer_rows(trace) for label, trace in traces.items()}
        sizes = {
            label: {kind: sum(t.nbytes for t in model.tensors.values() if t.type.name == kind) for kind in model.by_type()}
            for label, model in models.items()
        }
    finally:
        converted.unlink(missing_ok=True)
    with figures.style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
        figures.inventory_bars(sizes, left).set_title("Bytes by type: quantised blocks stay as they are")
        figures.norm_plot(rows, right).set_title("Activations after each layer: the same, bit for bit")
        figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)
    os.environ["TQDM_DISABLE"] = "1"
    for file in [Path(name) for name in sys.argv[1:]] or sorted(paths.notebooks_dir().glob("*.ipynb")):
        run_in_place(file)
    golden_rule_figure(DOCS / "golden-rule.svg")
