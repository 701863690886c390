"""Interactive explorers for JupyterLab: look at a broken model from the outside in.

    from aprlab import widgets
    widgets.onion_explorer()                      # break a model, watch it being peeled, repair it
    widgets.tensor_browser("a.gguf", "b.apr")     # both files as one table
    widgets.block_microscope("a.gguf", "b.apr")   # bytes, fields, values of one block
    widgets.trace_explorer("a.gguf", ["rope-norm"])   # layer × step heat map
    widgets.kernel_stepper()                      # a CUDA kernel, line by line, on the CPU

Each is a view-model in plain Python (`aprlab.widgets.models`) inside a view of ipywidgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprlab import paths

if TYPE_CHECKING:
    from aprlab.widgets.models.files import Side
    from aprlab.widgets.views import BlockView, KernelView, OnionView, TensorView, TraceView


def onion_explorer(files: Mapping[str, str | Path] | None = None) -> OnionView:
    """Choose a model and what to break, run, watch the verdict layer by layer, open figures, repair one by one.

    Args:
        files: label -> path of further healthy models; the embedded one and those of the models' folder are there.
    """
    from aprlab.widgets.models.onion import OnionExplorer
    from aprlab.widgets.views import OnionView

    return OnionView(OnionExplorer(files))


def tensor_browser(*files: str | Path) -> TensorView:
    """One or two model files as a table to be sorted and filtered; the embedded model without any.

    Raises:
        UsageError, FormatError, UnsupportedError: a file of which not even an index can be read.
    """
    from aprlab.widgets.models.tensors import TensorBrowser
    from aprlab.widgets.views import TensorView

    return TensorView(TensorBrowser(*_sides(files)))


def block_microscope(*files: str | Path, tensor: str = "") -> BlockView:
    """One block of a tensor at a time, on one side or two.

    Args:
        files: one file or two; the embedded model if there is none.
        tensor: GGUF name of the tensor to begin with; '' for the first quantised one.

    Raises:
        UsageError, FormatError, UnsupportedError: a file of which not even an index can be read, an unknown tensor.
    """
    from aprlab.widgets.models.blocks import BlockMicroscope
    from aprlab.widgets.views import BlockView

    return BlockView(BlockMicroscope(*_sides(files), name=tensor))


def trace_explorer(
    model: str | Path | None = None, faults: Iterable[str] = (), *, other: str | Path | None = None, engine: str = "",
    other_engine: str = "", source: Any = None,
) -> TraceView:  # fmt: skip
    """Compare a healthy forward pass with one that has faults, of another file, on another engine, or of another program.

    Args:
        model: a GGUF or APR file; the embedded model if None.
        faults: ids of faults that the other side runs with.
        other: the file of the other side, instead of the same.
        engine, other_engine: engines of the two sides; '' leaves the choice to the explorer.
        source: another program as the other side, as `aprlab.source` takes it: ``llama.cpp``, ``mine.yaml``, a recorded
            ``trace.npz``, a live model of transformers, a source.
    """
    from aprlab.widgets.models.traces import TraceExplorer
    from aprlab.widgets.views import TraceView

    path = paths.embedded_model() if model is None else model
    return TraceView(TraceExplorer(path, faults, other=other, engine=engine, other_engine=other_engine, source=source))


def kernel_stepper(
    model: str | Path | None = None, tensor: str = "", operation: str = "dequantise", fault: str = ""
) -> KernelView:
    """A CUDA kernel on the PTX machine: source and PTX side by side, registers, shared memory, counters.

    Args:
        model: whose tensor; the embedded model's without.
        tensor: its GGUF name; a Q4_K matrix without.
        operation: ``dequantise`` or ``matvec``.
        fault: a seeded bug of the kernels (`aprlab gpu faults` lists them).
    """
    from aprlab.widgets.models.kernel import KernelStepper
    from aprlab.widgets.views import KernelView

    return KernelView(KernelStepper(model, tensor, operation, fault))


def _sides(files: tuple[str | Path, ...]) -> list[Side]:
    from aprlab.widgets.models.files import Side

    return Side.open_all(files or (paths.embedded_model(),))


__all__ = ["block_microscope", "kernel_stepper", "onion_explorer", "tensor_browser", "trace_explorer"]
