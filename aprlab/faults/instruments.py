"""G. Instruments that lied: nothing is wrong but the measurement.

Each function has the arguments and the answer of an honest one, named by `RULERS`, and lies as upstream's did.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import AprlabError
from aprlab.faults.base import Fault, lines
from aprlab.formats import apr

Arrays = Mapping[str, np.ndarray]

# What each honest instrument takes and says.
RULERS = {
    "spread": "(values (T, n), reference (T, n)) -> ratio of their standard deviations over the same positions",
    "checksum": "(values) -> number that changes when values change, or only their order",
    "same": "(a, b: name -> values) -> whether all tensors of both sides are equal, and there are some",
    "verify": "(path) -> whether the file is whole and sound",
    "norm": "(weights (n,)) -> whether they can be a norm's",
    "all-hold": "(checks: one bool each) -> whether all of them hold, and there are some",
    "garbage": "(text) -> whether it is garbage",
    "status": "(text) -> exit status: 0 for an answer, another for garbage",
    "fixture": "(shape) -> float32 values that a test of decoders or layouts is made with",
    "better": "(distance before, distance after) -> whether a repair that brought this is to be kept",
}


def mixed_positions(values: np.ndarray, reference: np.ndarray) -> float:
    """All positions on one side, the last on the other."""
    return float(np.std(values[-1]) / np.std(reference))


def order_blind_checksum(values: np.ndarray) -> float:
    """The sum, which is the same whatever the order (exactly summed, so not even rounding tells)."""
    return math.fsum(np.asarray(values, np.float64).reshape(-1))


def nothing_compared(a: Arrays, b: Arrays) -> bool:
    """Right for every tensor it looks at; where names do not match it looks at none."""
    return all(np.array_equal(a[name], b[name]) for name in a if name in b and a[name].shape == b[name].shape)


def common_only(a: Arrays, b: Arrays) -> bool:
    """Tensors that only one side has are no business of this comparison; none in common is a difference, at least."""
    common = [name for name in a if name in b]
    return bool(common) and all(np.array_equal(a[name], b[name]) for name in common)


def always_succeeds(path: Path) -> bool:
    """Opens the file, looks at nothing, is content."""
    with open(path, "rb"):
        return True


def partly_valid(path: Path) -> bool:
    """Header, metadata and index can be read: valid. Whether the data is there is not asked."""
    try:
        apr.scan(path, verify=False)
    except AprlabError:
        return False
    return True


def norm_near_one(weights: np.ndarray) -> bool:
    """A norm's mean must lie near 1."""
    return bool(abs(float(np.mean(weights)) - 1) < 0.5)


FIRST = 10


def first_ten(checks: Sequence[bool]) -> bool:
    """The list is cut for display, and what is left of it is judged."""
    return bool(checks[:FIRST]) and all(checks[:FIRST])


def words_for_garbage(text: str) -> bool:
    """Looks for nan and inf (and so finds 'information'), and for nothing else but emptiness."""
    return not text.strip() or re.search(r"nan|inf", text.lower()) is not None


def exit_zero(text: str) -> int:
    """It ran, so it worked."""
    return 0


def square_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Square, one value throughout: transposition, permutation and lost scales leave it as it is."""
    side = min(shape)
    return np.zeros((side, side), np.float32)


def greedy_mending(before: float, after: float) -> bool:
    """Keep a repair only if it alone makes things better: of two faults that mask each other neither is ever mended."""
    return after < before


def _lie(id: str, title: str, ruler: str, story: str, mark: str, instrument: Callable[..., Any]) -> Fault:
    return Fault(id, title, "instrument", "G", story, mark, silent=True, instrument=instrument, ruler=ruler)


FAULTS = (
    _lie(
        "mixed-positions", "All positions on one side, the last on the other", "spread",
        lines(
            "The standard deviation of a prompt's activations was held against that of its last token.",
            "18.23× 'kernel bug' was 1.245× in truth.",
            "Both numbers were right; they were not of the same thing.",
        ),
        "A ratio far from 1 for equal activations.", mixed_positions,
    ),
    _lie(
        "order-blind-checksum", "A checksum that is a sum", "checksum",
        lines(
            "Fingerprints were sums of values.",
            "A transposed tensor has the same sum.",
            "GH-202 passed the gate that was made for it.",
        ),
        "Equal for any permutation.", order_blind_checksum,
    ),
    _lie(
        "nothing-compared", "Passed with nothing compared", "same",
        lines(
            "Names did not match, so no pair was ever looked at.",
            "all([]) is true.",
            "'0 differences' was printed, '0 compared' was not.",
        ),
        "Two files without a common name are called equal.", nothing_compared,
    ),
    _lie(
        "common-only", "Only tensors common to both sides compared", "same",
        lines(
            "The comparison walked over the intersection of names.",
            "84 lost biases are on one side only.",
            "Everything it looked at was equal.",
        ),
        "A file that lacks tensors is called equal.", common_only,
    ),
    _lie(
        "always-succeeds", "A verifier that cannot fail", "verify",
        lines(
            "The checks were stubs that returned Ok.",
            "A report with ten green lines was printed.",
            "Nobody fed it a broken file.",
        ),
        "True for any file that can be opened.", always_succeeds,
    ),
    _lie(
        "partial-file-valid", "A 95.5 % file called valid", "verify",
        lines(
            "Header and index were read, the spans were not held against the file's size.",
            "The last tensors lie beyond the end.",
            "Maps of files give zeros or a bus error there, much later.",
        ),
        "True for a cut file.", partly_valid,
    ),
    _lie(
        "norm-near-one", "'A norm's mean must be near 1'", "norm",
        lines(
            "A rule of thumb from Llama became a gate.",
            "Qwen's output_norm has a mean of 4.62 and is right.",
            "Good models were rejected, and the gate was switched off for all.",
        ),
        "False for good weights.", norm_near_one,
    ),
    _lie(
        "first-ten", "The list cut before it is judged", "all-hold",
        lines(
            "Findings were limited for display, then counted.",
            "The eleventh failure was never seen.",
            "With sorted names the first ten are all of layer 0.",
        ),
        "True although a later check fails.", first_ten,
    ),
    _lie(
        "words-for-garbage", "A garbage detector that looks for words", "garbage",
        lines(
            "Output was searched for 'nan' and 'inf'.",
            "'information' contains 'inf' and was called garbage.",
            "Multilingual salad contains neither and passed.",
        ),
        "Wrong both ways.", words_for_garbage,
    ),
    _lie(
        "exit-zero", "Exit status 0 with garbage", "status",
        lines(
            "The program said what the model said and ended well.",
            "Scripts look at the status.",
            "0 of 12 conversions were right, and no script stopped.",
        ),
        "0 for everything.", exit_zero,
    ),
    _lie(
        "square-zeros", "Tests with square shapes and constant values", "fixture",
        lines(
            "Fixtures were 4×4 or 256×256, all zeros or all ones.",
            "Transposition, wrong strides and wrong nibbles leave them unchanged.",
            "Thousands of tests passed over every bug in this list.",
        ),
        "Equal to its own transpose and to any permutation.", square_zeros,
    ),
    _lie(
        "greedy-mending", "A repair judged alone", "better",
        lines(
            "Each repair was tried by itself and dropped when the output got worse.",
            "Of two faults that mask each other, mending one makes it worse.",
            "Right repairs were taken back.",
        ),
        "False for each half of a masked pair, whose whole is right.", greedy_mending,
    ),
)  # fmt: skip
