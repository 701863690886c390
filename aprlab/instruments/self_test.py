"""Every instrument is shown known pairs that it must distinguish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import UsageError
from aprlab.formats.leftovers import temporary_folder
from aprlab.instruments.exhibits import better, spread, status
from aprlab.instruments.fixtures import fixture
from aprlab.instruments.hashes import checksum, same, verify
from aprlab.instruments.predicates import all_hold, garbage, norm
from aprlab.instruments.summary_statistics import statistics
from aprlab.model.config import ModelConfig
from aprlab.tracing.comparisons import compare_logits, compare_tokens, compare_traces, difference

# ── each against a known pair ─────────────────────────────────────────────────────────────────────────────────────


class Failed(Exception):
    """An instrument did not distinguish a known pair; the message says which."""


def _want(holds: object, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


def _refuses(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except UsageError:
        return
    raise Failed(f"accepts {what}")


def _check_checksum(measure: Callable[..., Any]) -> str:
    x = fixture((6, 8))
    _want(measure(x) == measure(x.copy()), "two equal arrays have two checksums")
    _want(measure(x) != measure(np.ascontiguousarray(x.T)), "a transposed tensor has the checksum of the original")
    _want(measure(x) != measure(x[::-1].copy()), "exchanged rows are not noticed")
    nudged = x.copy()
    nudged.view(np.uint32)[3, 5] ^= 1
    _want(measure(x) != measure(nudged), "one changed bit is not noticed")
    return "notices a transposed tensor, exchanged rows and one changed bit; the order-blind sum notices neither of the first two"


def _check_statistics(measure: Callable[..., Any]) -> str:
    x = fixture((7, 11))
    seen, again = measure(x), measure(x.copy())
    _want(seen == again, "two equal arrays have two statistics")
    wanted = x.astype(np.float64)
    _want(abs(seen.mean - wanted.mean()) < 1e-9 and abs(seen.std - wanted.std()) < 1e-6, "mean or std is off")
    _want((seen.min, seen.max) == (x.min(), x.max()), "an extreme is off")
    broken = x.copy()
    broken[0, :3] = (np.nan, np.inf, 0)
    seen = measure(broken)
    _want((seen.nan, seen.inf, seen.zeros, seen.count) == (1, 1, 1, 77), "NaN, Inf or zeros are miscounted")
    _want(measure(x * 2).std != again.std, "a doubled array has the same spread")
    _refuses(lambda: measure(x[:0]), "an empty array")
    return "mean, std and extremes agree with float64; NaN, Inf and zeros are counted apart"


def _check_comparison(measure: Callable[..., Any]) -> str:
    x = fixture((5, 9))
    _want(measure(x, x.copy()).equal, "equal arrays are called different")
    other = x.copy()
    other[2, 4] += 1
    found = measure(x, other)
    exact = found.worst == (2, 4) and abs(found.max_abs - 1) < 1e-5
    _want(not found.equal and exact, "a difference of 1 is not found where it is")
    _refuses(lambda: measure(x, x.T.copy()), "unlike shapes")
    _refuses(lambda: measure(x[:0], x[:0]), "nothing against nothing")
    _want(not compare_tokens([1, 2, 3], [1, 2]).equal, "the longer token list's rest is dropped")
    _want(compare_tokens([1, 2], [1, 2]).equal, "equal token lists are called different")
    _refuses(lambda: compare_tokens([], []), "no tokens against no tokens")
    _want(not compare_logits(x, other).equal and compare_logits(x, x.copy()).equal, "different logits are called equal")
    return "finds one changed value where it is, drops no rest, refuses unlike shapes and nothing at all"


def _check_trace(measure: Callable[..., Any]) -> str:
    from aprlab.tracing.traces import Point, Trace

    config = ModelConfig("qwen2", 1, 4, 8, 2, 1, 2, 16, 8, 1e6, "neox", 1e-6, True)

    def run(values: np.ndarray, positions: Sequence[int], contract: str = "f32") -> Trace:
        point = Point("embed", values, np.array(positions, np.int64), "reference", contract)
        return Trace({"embed": point}, [1, 2, 3], "reference", contract, config, {"path": "", "format": "gguf"})

    x = fixture((3, 4))
    _want(measure(run(x, [0, 1, 2]), run(x.copy(), [0, 1, 2])).equal, "equal traces are called different")
    _want(not measure(run(x, [0, 1, 2]), run(x + 1, [0, 1, 2])).equal, "different traces are called equal")
    _refuses(lambda: measure(run(x, [0, 1, 2]), run(x[-1:], [2])), "all positions against the last")
    _refuses(lambda: measure(run(x, [0, 1, 2]), run(x, [0, 1, 2], "q8")), "two activation contracts")
    return "refuses to compare all positions with the last, and one activation contract with another"


def _check_spread(measure: Callable[..., Any]) -> str:
    x = fixture((6, 8)) * np.arange(1, 7, dtype=np.float32)[:, None]  # the last position is the largest
    _want(abs(measure(x, x.copy()) - 1) < 1e-6, f"equal activations differ by {measure(x, x.copy()):.3g}×")
    _want(abs(measure(2 * x, x) - 2) < 1e-5, "doubled activations do not differ by 2×")
    return "1× for equal activations, 2× for doubled ones"


def _check_same(measure: Callable[..., Any]) -> str:
    x, y = fixture((3, 5)), fixture((5, 3))
    _want(measure({"q": x, "k": y}, {"q": x.copy(), "k": y.copy()}), "equal sides are called different")
    _want(not measure({"q": x, "k": y}, {"q": x, "k": y + 1}), "different values are called equal")
    _want(not measure({"q": x, "k": y}, {"q": x}), "a tensor that one side lacks is no difference")
    _want(not measure({"q": x}, {"q": x, "k": y}), "a tensor that the other side lacks is no difference")
    _want(not measure({"q": x}, {"k": x}), "two sides without a common name are called equal")
    _want(not measure({}, {}), "nothing against nothing is called equal")
    return "the union of names is compared, and nothing is never equal to nothing"


def _check_verify(measure: Callable[..., Any]) -> str:
    """A small APR file, whole, and the same file broken in six ways."""
    with temporary_folder() as folder:
        whole = folder / "whole.apr"
        _small_file(whole)
        good = whole.read_bytes()
        _want(measure(whole), "a sound file is refused")
        data = int.from_bytes(good[32:40], "little")
        code = good.index(b"model.norm.weight") + len(b"model.norm.weight")
        tampered = {
            "a file cut to 95.5 %": good[: int(len(good) * 0.955)],
            "a file without its last tensor": good[: data + 64],
            "an unknown dtype byte": good[:code] + b"\x4d" + good[code + 1 :],
            "a dtype byte that breaks the size law": good[:code] + b"\x0c" + good[code + 1 :],
            "an unknown tensor name": good.replace(b"model.norm.weight", b"model.morn.weight"),
            "one changed bit of data": good[: data + 8] + bytes([good[data + 8] ^ 1]) + good[data + 9 :],
        }
        for what, content in tampered.items():
            broken = folder / "broken.apr"
            broken.write_bytes(content)
            _want(content != good and not measure(broken), f"accepts {what}")
    return f"takes a sound file, refuses {', '.join(tampered)}"


def _small_file(path: Path) -> None:
    """An APR file of three tensors; not a model."""
    from aprlab.formats import apr

    plans = []
    for name, shape in (("model.norm.weight", (24,)), ("lm_head.weight", (6, 24)), ("model.embed_tokens.weight", (6, 24))):
        raw = fixture(shape).tobytes()
        plans.append(apr.Plan(name, 0, shape, len(raw), lambda raw=raw: iter([raw])))  # type: ignore[misc]
    apr.write(path, {}, plans, apr.DIALECTS["aprender"])


def _check_norm(measure: Callable[..., Any]) -> str:
    x = 1 + 0.1 * fixture((24,))
    _want(measure(x), "weights around 1 are refused")
    _want(measure(x * np.float32(4.62)), "a mean of 4.62, Qwen's own, is refused")
    _want(measure(0.02 * x - 0.05), "small weights, some below 0, are refused")
    _want(not measure(np.zeros(24, np.float32)), "zeros are accepted")
    _want(not measure(np.where(np.arange(24) == 3, np.float32(np.nan), x)), "NaN is accepted")
    return "takes any finite weights that differ from each other, whatever their mean; refuses zeros and NaN"


def _check_all_hold(measure: Callable[..., Any]) -> str:
    _want(measure([True] * 40), "forty checks that hold are refused")
    for at in (0, 9, 10, 39):
        _want(not measure([n != at for n in range(40)]), f"check {at + 1} of 40 fails and is not seen")
    _want(not measure([]), "no checks at all are taken for success")
    return "sees a failure at any place of forty; nothing checked is no success"


GOOD_TEXTS = (
    "4", "2 + 2 equals 4.", "information", "The financial nanny was informed.", "东京", "def add(a, b):\n    return a + b",
)  # fmt: skip
BAD_TEXTS = (
    "", "VILLEVILLEVILLEVILLEVILLE", "türleminÐ¸ÑĩÐµÑģÑĤÐ²Ð¾ gabantha", "3,}, helf helf.How helf",
    "3,},\ufffd\ufffd выпол 事 LENG",
)  # fmt: skip


def _check_garbage(measure: Callable[..., Any]) -> str:
    for text in GOOD_TEXTS:
        _want(not measure(text), f"calls {text!r} garbage")
    for text in BAD_TEXTS:
        _want(measure(text), f"takes {text!r} for an answer")
    return f"accepts {len(GOOD_TEXTS)} answers, catches {len(BAD_TEXTS)} pieces of garbage, the ticket's among them"


def _check_status(measure: Callable[..., Any]) -> str:
    for text in GOOD_TEXTS:
        _want(measure(text) == 0, f"status {measure(text)} for {text!r}")
    for text in BAD_TEXTS:
        _want(measure(text) != 0, f"status 0 for {text!r}")
    return "0 for answers, another for garbage"


def _check_fixture(measure: Callable[..., Any]) -> str:
    x = measure((6, 8))
    _want(x.shape == (6, 8), f"asked for (6, 8), made {x.shape}")
    _want(len(np.unique(x)) == x.size, "values repeat: exchanged rows or nibbles would not be noticed")
    _want(np.all(x != 0), "zeros: a lost scale would not be noticed")
    return "not square, no two values alike, no zeros"


def _check_better(measure: Callable[..., Any]) -> str:
    # two faults mask each other: 1.0 with both, 2.0 with either, 0.0 with none
    _want(measure(1.0, 2.0) and measure(2.0, 0.0), "of two faults that mask each other, the first repair is thrown away")
    _want(not measure(1.0, 1.0), "a repair that changes nothing is kept")
    return "keeps both halves of a masked pair, drops what changes nothing"


@dataclass(frozen=True, slots=True)
class Instrument:
    """A measurement and its proof.

    Attributes:
        name: what gates call it by.
        measure: the function.
        check: gets the function to be tested and raises `Failed`, or says what was shown.
        exhibit: kept for notebook 05; nothing in this package is measured with it.
    """

    name: str
    measure: Callable[..., Any]
    check: Callable[[Callable[..., Any]], str]
    exhibit: bool = False


INSTRUMENTS: dict[str, Instrument] = {
    i.name: i
    for i in (
        Instrument("checksum", checksum, _check_checksum),
        Instrument("statistics", statistics, _check_statistics),
        Instrument("comparison", difference, _check_comparison),
        Instrument("trace", compare_traces, _check_trace),
        Instrument("spread", spread, _check_spread, exhibit=True),
        Instrument("same", same, _check_same),
        Instrument("verify", verify, _check_verify),
        Instrument("norm", norm, _check_norm),
        Instrument("all-hold", all_hold, _check_all_hold),
        Instrument("garbage", garbage, _check_garbage),
        Instrument("status", status, _check_status, exhibit=True),
        Instrument("fixture", fixture, _check_fixture),
        Instrument("better", better, _check_better, exhibit=True),
    )
}


@dataclass(frozen=True, slots=True)
class InstrumentResult:
    """Whether one instrument distinguished its known pairs; `detail` says what was shown, or where it failed."""

    name: str
    ok: bool
    detail: str


def selftest(replaced: Mapping[str, Callable[..., Any]] | None = None) -> list[InstrumentResult]:
    """Show every instrument known-equal and known-different pairs.

    Args:
        replaced: other functions for some instruments, by name, as the instrument faults of the catalogue are:
            ``selftest({fault.replaces: fault.instrument})``.

    Raises:
        UsageError: `replaced` names no instrument.
    """
    return InstrumentSet(replaced).selftest()


class InstrumentSet:
    """The instruments to measure with: this package's, some of them replaced on request.

    Args:
        replaced: other functions for some instruments, by name.

    Raises:
        UsageError: `replaced` names no instrument.
    """

    def __init__(self, replaced: Mapping[str, Callable[..., Any]] | None = None) -> None:
        if unknown := [name for name in replaced or () if name not in INSTRUMENTS]:
            message = f"unknown instrument {unknown[0]!r}; known: {', '.join(INSTRUMENTS)}"
            raise UsageError(message, code="instruments.unknown")
        self._held = {i.name: i.measure for i in INSTRUMENTS.values()} | dict(replaced or {})

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """The function that measures; KeyError for an instrument that is not in this set."""
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def only(self, names: Iterable[str]) -> InstrumentSet:
        """A set that holds these alone: who is given it cannot measure with another."""
        few = InstrumentSet()
        few._held = {name: self._held[name] for name in names}
        return few

    def selftest(self) -> list[InstrumentResult]:
        """Every instrument of this set against its known pairs."""
        return [show(INSTRUMENTS[name], measure) for name, measure in self._held.items()]


def show(instrument: Instrument, measure: Callable[..., Any] | None = None) -> InstrumentResult:
    """Test one instrument on its known pairs.

    Args:
        instrument: whose pairs are used.
        measure: tested instead of the instrument's own function.
    """
    try:
        return InstrumentResult(instrument.name, True, instrument.check(measure or instrument.measure))
    except Failed as failure:
        return InstrumentResult(instrument.name, False, str(failure))
    except Exception as error:  # an instrument that breaks has failed, however it does
        return InstrumentResult(instrument.name, False, f"{type(error).__name__}: {error}")


def void(results: Sequence[InstrumentResult]) -> frozenset[str]:
    """Names of the instruments that failed: what was measured with them counts for nothing."""
    return frozenset(result.name for result in results if not result.ok)
