"""Instruments: hashes, statistics, fingerprints, the garbage detector, and the self-test that each of them has to pass."""

from aprlab.instruments.exhibits import GARBAGE_STATUS, better, spread, status
from aprlab.instruments.fingerprints import (
    COLUMNS,
    LARGE,
    PART,
    Fingerprint,
    compare_fingerprints,
    diff,
    fingerprint,
    fingerprint_table,
    transposed_unseen,
)
from aprlab.instruments.fixtures import fixture
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.instruments.hashes import checksum, same, verify
from aprlab.instruments.predicates import all_hold, garbage, norm
from aprlab.instruments.self_test import (
    INSTRUMENTS,
    Instrument,
    InstrumentResult,
    InstrumentSet,
    selftest,
    show,
    void,
)
from aprlab.instruments.summary_statistics import PERCENTILES, SAMPLE, Statistics, statistics

__all__ = [
    "COLUMNS",
    "GARBAGE_STATUS",
    "INSTRUMENTS",
    "LARGE",
    "PART",
    "PERCENTILES",
    "SAMPLE",
    "Fingerprint",
    "Instrument",
    "InstrumentResult",
    "InstrumentSet",
    "Statistics",
    "all_hold",
    "better",
    "checksum",
    "compare_fingerprints",
    "diff",
    "fingerprint",
    "fingerprint_table",
    "fixture",
    "garbage",
    "is_garbage",
    "norm",
    "same",
    "selftest",
    "show",
    "spread",
    "statistics",
    "status",
    "transposed_unseen",
    "verify",
    "void",
]
