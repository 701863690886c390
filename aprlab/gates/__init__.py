"""Gates: what has to hold before a converted model may be used, and the proof that each of them can fail."""

from aprlab.gates.catalogue import GATES, PROBES, TOLERANCE, Gate
from aprlab.gates.matrix import KILL, PASS, REFUSED, VOID, KillMatrix, MatrixRow, kill_matrix
from aprlab.gates.matrix_page import figure_cells, markdown, short
from aprlab.gates.repairs import RepairOutcome, attempt, repair
from aprlab.gates.results import GateResult, GateResults
from aprlab.gates.running import MAX_TOKENS, PROMPTS, run
from aprlab.gates.sibling_model import sibling
from aprlab.gates.ten_stages import STAGES, StageResult, check
from aprlab.gates.words import TEMPLATES, words

__all__ = [
    "GATES",
    "KILL",
    "MAX_TOKENS",
    "PASS",
    "PROBES",
    "PROMPTS",
    "REFUSED",
    "STAGES",
    "TEMPLATES",
    "TOLERANCE",
    "VOID",
    "Gate",
    "GateResult",
    "GateResults",
    "KillMatrix",
    "MatrixRow",
    "RepairOutcome",
    "StageResult",
    "attempt",
    "check",
    "figure_cells",
    "kill_matrix",
    "markdown",
    "repair",
    "run",
    "short",
    "sibling",
    "words",
]
