"""Instruments: hashes, statistics, fingerprints, the garbage detector, and the self-test that each of them has to pass."""

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
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.instruments.hashes import checksum, same, verify
from aprlab.instruments.self_test import INSTRUMENTS, Instrument, InstrumentResult, selftest, show, void
from aprlab.instruments.summary_statistics import PERCENTILES, SAMPLE, Statistics, spread, statistics
from aprlab.instruments.ticket import GARBAGE_STATUS, all_hold, better, fixture, garbage, norm, status

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
