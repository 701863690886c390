"""G. Faulty instruments: only the measurement is wrong.

Each function has the arguments and the result of a sound one, named in `REPLACEABLE`, and is wrong in the way upstream's was.
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

# What each sound instrument takes and returns.
REPLACEABLE = {
    "spread": "(values (T, n), reference (T, n)) -> ratio of their standard deviations over the same positions",
    "checksum": "(values) -> number that changes when values change, or only their order",
    "same": "(a, b: name -> values) -> whether all tensors of both sides are equal, and there are some",
    "verify": "(path) -> whether the file is whole and sound",
    "norm": "(weights (n,)) -> whether they can be a norm's",
    "all-hold": "(checks: one bool each) -> whether all of them hold, and there are some",
    "garbage": "(text) -> whether it is garbage",
    "status": "(text) -> exit status: 0 for an answer, another for garbage",
    "fixture": "(shape) -> float32 values that a test of decoders or layouts is made with",
    "better": "(distance before, distance after) -> whether a repair with this effect is kept",
}


def mixed_positions(values: np.ndarray, reference: np.ndarray) -> float:
    """All positions on one side, the last on the other."""
    return float(np.std(values[-1]) / np.std(reference))


def order_blind_checksum(values: np.ndarray) -> float:
    """The sum, which does not depend on the order (summed exactly, so not even rounding shows it)."""
    return math.fsum(np.asarray(values, np.float64).reshape(-1))


def nothing_compared(a: Arrays, b: Arrays) -> bool:
    """Correct for every tensor it looks at; if no names match, it looks at none."""
    return all(np.array_equal(a[name], b[name]) for name in a if name in b and a[name].shape == b[name].shape)


def common_only(a: Arrays, b: Arrays) -> bool:
    """Ignores tensors that only one side has; no tensor in common counts as a difference, at least."""
    common = [name for name in a if name in b]
    return bool(common) and all(np.array_equal(a[name], b[name]) for name in common)


def always_succeeds(path: Path) -> bool:
    """Opens the file and checks nothing."""
    with open(path, "rb"):
        return True


def partly_valid(path: Path) -> bool:
    """Valid if header, metadata and index can be read. Whether the data is there is not checked."""
    try:
        apr.scan(path, verify=False)
    except AprlabError:
        return False
    return True


def norm_near_one(weights: np.ndarray) -> bool:
    """A norm's mean must be near 1."""
    return bool(abs(float(np.mean(weights)) - 1) < 0.5)


FIRST = 10


def first_ten(checks: Sequence[bool]) -> bool:
    """The list is shortened for display, and the verdict is made from what is left."""
    return bool(checks[:FIRST]) and all(checks[:FIRST])


def words_for_garbage(text: str) -> bool:
    """Looks for nan and inf (and so finds 'information'), and for empty text."""
    return not text.strip() or re.search(r"nan|inf", text.lower()) is not None


def exit_zero(text: str) -> int:
    """It ran, so it worked."""
    return 0


def square_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Square, all one value: transposition, permutation and lost scales do not change it."""
    side = min(shape)
    return np.zeros((side, side), np.float32)


def greedy_mending(before: float, after: float) -> bool:
    """Keep a repair only if it helps on its own: of two faults that mask each other, neither is ever fixed."""
    return after < before


def _lie(id: str, title: str, replaces: str, story: str, mark: str, instrument: Callable[..., Any]) -> Fault:
    return Fault(id, title, "instrument", "G", story, mark, silent=True, instrument=instrument, replaces=replaces)


FAULTS = (
    _lie(
        "mixed-positions", "All positions on one side, the last position on the other", "spread",
        lines(
            "The standard deviation over all prompt positions was compared with that of the last position.",
            "The 18.23× 'kernel bug' was really 1.245×.",
            "Both numbers were correct; they did not measure the same thing.",
        ),
        "For equal activations the ratio is far from 1.", mixed_positions,
    ),
    _lie(
        "order-blind-checksum", "A checksum that is a sum", "checksum",
        lines(
            "The fingerprint was the sum of the values.",
            "A transposed tensor has the same sum.",
            "GH-202 passed the very gate that was written for it.",
        ),
        "Equal under any permutation.", order_blind_checksum,
    ),
    _lie(
        "nothing-compared", "Pass with nothing compared", "same",
        lines(
            "The names did not match, so no pair was ever compared.",
            "all([]) is true.",
            "It printed '0 differences', but not '0 compared'.",
        ),
        "Two files with no name in common are called equal.", nothing_compared,
    ),
    _lie(
        "common-only", "Only tensors that both sides have are compared", "same",
        lines(
            "The comparison iterated over the intersection of names.",
            "84 lost biases exist on one side only.",
            "Everything that it compared was equal.",
        ),
        "A file with missing tensors is called equal.", common_only,
    ),
    _lie(
        "always-succeeds", "A verifier that cannot fail", "verify",
        lines(
            "The checks were stubs that returned Ok.",
            "It printed a report with ten green lines.",
            "Nobody had tried it on a broken file.",
        ),
        "True for any file that can be opened.", always_succeeds,
    ),
    _lie(
        "partial-file-valid", "A file truncated to 95.5 % called valid", "verify",
        lines(
            "Header and index were read; the spans were not checked against the file size.",
            "The last tensors are past the end of the file.",
            "A memory map gives zeros or a bus error there, much later.",
        ),
        "True for a truncated file.", partly_valid,
    ),
    _lie(
        "norm-near-one", "'A norm's mean must be near 1'", "norm",
        lines(
            "A rule of thumb from Llama became a gate.",
            "Qwen's output_norm has a mean of 4.62 and is correct.",
            "Good models were rejected, so the gate was turned off for all models.",
        ),
        "False for correct weights.", norm_near_one,
    ),
    _lie(
        "first-ten", "Verdict on a truncated list", "all-hold",
        lines(
            "The list of findings was shortened for display, and then counted.",
            "Nobody ever saw the eleventh failure.",
            "With sorted names the first ten are all in layer 0.",
        ),
        "True even if a later check fails.", first_ten,
    ),
    _lie(
        "words-for-garbage", "A garbage detector that looks for words", "garbage",
        lines(
            "It searched the output for 'nan' and 'inf'.",
            "'information' contains 'inf', so it was called garbage.",
            "Multilingual word salad contains neither, and passed.",
        ),
        "Wrong in both directions.", words_for_garbage,
    ),
    _lie(
        "exit-zero", "Exit status 0 for garbage", "status",
        lines(
            "The program printed the model's output and exited normally.",
            "Scripts look at the status.",
            "0 of 12 conversions were correct, and no script stopped.",
        ),
        "Always 0.", exit_zero,
    ),
    _lie(
        "square-zeros", "Tests with square shapes and constant values", "fixture",
        lines(
            "Test fixtures were 4×4 or 256×256, all zeros or all ones.",
            "A transposition, wrong strides or wrong nibbles leave them unchanged.",
            "Thousands of tests passed, and missed every bug in this list.",
        ),
        "Equal to its own transpose and to any permutation of itself.", square_zeros,
    ),
    _lie(
        "greedy-mending", "A repair judged on its own", "better",
        lines(
            "Each repair was tried alone and dropped if the output got worse.",
            "If two faults mask each other, fixing one makes the output worse.",
            "Correct repairs were reverted.",
        ),
        "False for each half of a masked pair, although both together are the correct repair.", greedy_mending,
    ),
)  # fmt: skip
