"""Gates: what has to hold before a converted model may be used, and the proof that each of them can fail."""

from aprlab.gates.gates import (
    GATES,
    PROMPTS,
    Gate,
    GateResult,
    KillMatrix,
    Row,
    figure_cells,
    kill_matrix,
    markdown,
    run,
    sibling,
)

__all__ = [
    "GATES",
    "PROMPTS",
    "Gate",
    "GateResult",
    "KillMatrix",
    "Row",
    "figure_cells",
    "kill_matrix",
    "markdown",
    "run",
    "sibling",
]
