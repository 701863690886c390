"""Instruments: what everything else measures with, and the proof that each of them can tell two things apart.

`selftest` shows every instrument a pair that is known to be equal and one that is known to differ. An instrument that
fails is named, and what rests on it is void: half of upstream's hunt went to rulers that lied.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from aprlab.compare import Comparison, compare_logits, compare_models, compare_tokens, compare_traces, difference
from aprlab.engines.blas import blas_threads
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.formats.common import drop_pages
from aprlab.garbage import is_garbage
from aprlab.model import Model, ModelConfig, Tensor
from aprlab.paths import cores

# ── the instruments ───────────────────────────────────────────────────────────────────────────────────────────────

Arrays = Mapping[str, np.ndarray]


def checksum(values: np.ndarray) -> int:
    """XXH3-64 of dtype, shape and bytes: changes with any value and with their order."""
    values = np.ascontiguousarray(values)
    state = xxhash.xxh3_64(f"{values.dtype.str}{values.shape}".encode())
    state.update(values.reshape(-1).view(np.uint8).data)
    return state.intdigest()


PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
SAMPLE = 1 << 20  # percentiles of larger tensors are of about so many values, evenly spaced


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures of the finite values of an array, in float64; None where there are none.

    `percentiles` are those of `PERCENTILES`. `total` is the order-blind sum that upstream called a checksum.
    """

    count: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    percentiles: tuple[float, ...]
    zeros: int
    nan: int
    inf: int
    total: float


def statistics(values: np.ndarray) -> Statistics:
    """Mean, standard deviation, extremes, percentiles, and how many values are zero, NaN, infinite; never of nothing."""
    flat = np.asarray(values).reshape(-1)
    if not flat.size:
        raise UsageError("statistics of nothing: the array is empty")
    nan, inf = int(np.isnan(flat).sum()), int(np.isinf(flat).sum())
    finite = flat[np.isfinite(flat)] if nan or inf else flat
    if not finite.size:
        return Statistics(flat.size, None, None, None, None, (), 0, nan, inf, float("nan"))
    sample = finite[:: max(1, finite.size // SAMPLE)]
    mean = float(np.mean(finite, dtype=np.float64))
    variance = float(np.mean(np.square(finite - np.float32(mean), dtype=np.float64))) - (mean - float(np.float32(mean))) ** 2
    return Statistics(
        flat.size, mean, max(variance, 0.0) ** 0.5, float(finite.min()), float(finite.max()),
        tuple(float(p) for p in np.percentile(sample, PERCENTILES)),
        int(finite.size - np.count_nonzero(finite)), nan, inf, mean * finite.size,
    )  # fmt: skip


def spread(values: np.ndarray, reference: np.ndarray) -> float:
    """Ratio of the standard deviations of two activations ``(T, n)`` over the same positions; unlike shapes raise."""
    if values.shape != reference.shape:
        raise UsageError(f"unlike positions: {values.shape} against {reference.shape}")
    return float(np.std(values, dtype=np.float64) / np.std(reference, dtype=np.float64))


def same(a: Arrays, b: Arrays) -> bool:
    """Whether both sides have the same names, at least one, and equal values under each, bit for bit."""
    if not a or a.keys() != b.keys():
        return False
    return all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype and difference(a[n], b[n]).equal for n in a)


def verify(path: Path) -> bool:
    """Whether the strict reader takes the file, footer CRC and scales included."""
    try:
        Model.open(path).check_values()
    except AprlabError:
        return False
    return True


def norm(weights: np.ndarray) -> bool:
    """Whether these can be a norm's weights ``(n,)``: finite, and not all one value, zero least of all.

    Nothing is said of the mean: 4.62 is right for Qwen's output_norm.
    """
    return weights.ndim == 1 and bool(np.isfinite(weights).all()) and bool(np.ptp(weights) > 0)


def all_hold(checks: Sequence[bool]) -> bool:
    """Whether there are checks and every one of them holds."""
    return len(checks) > 0 and all(checks)


def garbage(text: str) -> bool:
    """See `aprlab.garbage.is_garbage`."""
    return is_garbage(text)[0]


GARBAGE_STATUS = 3


def status(text: str) -> int:
    """Exit status for an answer: 0, or `GARBAGE_STATUS` where it is garbage."""
    return GARBAGE_STATUS if garbage(text) else 0


def fixture(shape: tuple[int, ...]) -> np.ndarray:
    """float32 values to test decoders and layouts with: `shape` as asked for, no two values alike."""
    values = np.random.default_rng(20260130).normal(size=shape).astype(np.float32)
    return values + np.arange(values.size, dtype=np.float32).reshape(shape) / values.size


def better(before: float, after: float) -> bool:
    """Whether a repair that moved the distance from `before` to `after` stays in the running: it did something.

    Nearer or farther is asked of sets only: of two faults that mask each other, each mended alone makes things worse.
    """
    return after != before


# ── each against a known pair ─────────────────────────────────────────────────────────────────────────────────────


class Failed(Exception):
    """An instrument did not tell a known pair apart; the message says which."""


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
    _want(measure(x) != measure(x[::-1].copy()), "exchanged rows are not seen")
    nudged = x.copy()
    nudged.view(np.uint32)[3, 5] ^= 1
    _want(measure(x) != measure(nudged), "one changed bit is not seen")
    return "tells a transposed tensor, exchanged rows and one changed bit; the order-blind sum tells none of the first two"


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
    _want(not compare_logits(x, other).equal and compare_logits(x, x.copy()).equal, "logits are not told apart")
    return "finds one changed value where it is, drops no rest, refuses unlike shapes and nothing at all"


def _check_trace(measure: Callable[..., Any]) -> str:
    from aprlab.trace import Point, Trace

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
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.apr"
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
            broken = Path(folder) / "broken.apr"
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
    _want(len(np.unique(x)) == x.size, "values repeat: exchanged rows or nibbles would not be seen")
    _want(np.all(x != 0), "zeros: a lost scale would not be seen")
    return "not square, no two values alike, no zeros"


def _check_better(measure: Callable[..., Any]) -> str:
    # two faults mask each other: 1.0 with both, 2.0 with either, 0.0 with none
    _want(measure(1.0, 2.0) and measure(2.0, 0.0), "of two faults that mask each other, the first repair is thrown away")
    _want(not measure(1.0, 1.0), "a repair that changes nothing is kept")
    return "keeps both halves of a masked pair, drops what changes nothing"


@dataclass(frozen=True, slots=True)
class Instrument:
    """A measurement and its proof; `check` gets the function to be tested and raises `Failed`, or says what was shown."""

    name: str
    measure: Callable[..., Any]
    check: Callable[[Callable[..., Any]], str]


INSTRUMENTS: dict[str, Instrument] = {
    i.name: i
    for i in (
        Instrument("checksum", checksum, _check_checksum),
        Instrument("statistics", statistics, _check_statistics),
        Instrument("comparison", difference, _check_comparison),
        Instrument("trace", compare_traces, _check_trace),
        Instrument("spread", spread, _check_spread),
        Instrument("same", same, _check_same),
        Instrument("verify", verify, _check_verify),
        Instrument("norm", norm, _check_norm),
        Instrument("all-hold", all_hold, _check_all_hold),
        Instrument("garbage", garbage, _check_garbage),
        Instrument("status", status, _check_status),
        Instrument("fixture", fixture, _check_fixture),
        Instrument("better", better, _check_better),
    )
}


@dataclass(frozen=True, slots=True)
class InstrumentResult:
    """Whether one instrument told its known pairs apart; `detail` says what was shown, or where it failed."""

    name: str
    ok: bool
    detail: str


def selftest(replaced: Mapping[str, Callable[..., Any]] | None = None) -> list[InstrumentResult]:
    """Show every instrument known-equal and known-different pairs.

    Args:
        replaced: other functions for some instruments, by name, as the instrument faults of the catalogue are:
            ``selftest({fault.ruler: fault.instrument})``.

    Raises:
        UsageError: `replaced` names no instrument.
    """
    replaced = replaced or {}
    if unknown := [name for name in replaced if name not in INSTRUMENTS]:
        raise UsageError(f"unknown instrument {unknown[0]!r}; known: {', '.join(INSTRUMENTS)}")
    return [show(instrument, replaced.get(instrument.name)) for instrument in INSTRUMENTS.values()]


def show(instrument: Instrument, measure: Callable[..., Any] | None = None) -> InstrumentResult:
    """One instrument (or `measure` in its place) against its known pairs."""
    try:
        return InstrumentResult(instrument.name, True, instrument.check(measure or instrument.measure))
    except Failed as failure:
        return InstrumentResult(instrument.name, False, str(failure))
    except Exception as error:  # an instrument that breaks has failed, however it does
        return InstrumentResult(instrument.name, False, f"{type(error).__name__}: {error}")


def void(results: Sequence[InstrumentResult]) -> frozenset[str]:
    """Names of the instruments that failed: what was measured with them counts for nothing."""
    return frozenset(result.name for result in results if not result.ok)


# ── fingerprints ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One tensor: order-sensitive hashes beside order-blind figures.

    Attributes:
        name: GGUF name; type, shape (NumPy order) as in the file.
        raw: XXH3-64 of the raw blocks, hexadecimal.
        values: XXH3-64 of the decoded float32 values in row order, hexadecimal.
        seen: statistics of the decoded values.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    raw: str
    values: str
    seen: Statistics

    def row(self) -> dict[str, Any]:
        """Flat, for tables: the percentiles as ``p1`` … ``p99``."""
        flat: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seen"}
        flat |= {k: v for k, v in asdict(self.seen).items() if k != "percentiles"}
        return flat | {f"p{p}": v for p, v in zip(PERCENTILES, self.seen.percentiles, strict=False)}


COLUMNS = ("name", "type", "shape", "raw", "values", "mean", "std", "min", "max", "p50", "zeros", "nan", "inf", "total")


def fingerprint(thing: Model | Tensor | str | Path, progress: Callable[[int], object] | None = None) -> list[Fingerprint]:
    """Fingerprints of every tensor of a model (or of one tensor); decodes each once, some tensors at a time.

    Args:
        thing: a model, its path, or a tensor.
        progress: called with the bytes of each tensor that is done, in the file's order.

    Raises:
        FormatError: the strict reader refuses the file, or there is nothing in it.
    """
    if isinstance(thing, Tensor):
        return [_fingerprint(thing)]
    model = thing if isinstance(thing, Model) else Model.open(thing)
    if not model.tensors:
        raise FormatError("holds no tensors", path=model.path)
    found = []
    # A second BLAS thread would have nothing to do but spin; each of ours holds some 30 MiB.
    with blas_threads(1), ThreadPoolExecutor(min(4, cores()), "aprlab-fingerprint") as pool:
        for tensor, seen in zip(model.tensors.values(), pool.map(_fingerprint, model.tensors.values()), strict=True):
            found.append(seen)
            if progress is not None:
                progress(tensor.raw.nbytes)
    return found


def _fingerprint(tensor: Tensor) -> Fingerprint:
    if tensor.size > LARGE and tensor.rows > 1:
        return _in_parts(tensor)
    values = tensor.dequantise()
    flat = np.ascontiguousarray(values).reshape(-1)
    hashes = [xxhash.xxh3_64_hexdigest(np.ascontiguousarray(part).data) for part in (tensor.raw, flat.view(np.uint8))]
    drop_pages(tensor.raw)
    return Fingerprint(tensor.name, tensor.type.name, tensor.shape, hashes[0], hashes[1], statistics(values))


LARGE = 1 << 22  # values of a tensor that is looked at in parts, so that memory does not grow with it
PART = 1 << 20


def _in_parts(tensor: Tensor) -> Fingerprint:
    """The same fingerprint, a few rows at a time. Hashes are equal to the bit, mean and spread to a rounding of float64."""
    raw, hashed = xxhash.xxh3_64(), xxhash.xxh3_64()
    raw.update(np.ascontiguousarray(tensor.raw[: tensor.type.tensor_bytes]).data)
    step, stride = max(1, PART // tensor.cols), max(1, tensor.size // SAMPLE)
    count = nan = inf = zeros = 0
    mean = squares = 0.0
    least, most = float("inf"), float("-inf")
    sample: list[np.ndarray] = []
    for start in range(0, tensor.rows, step):
        rows = slice(start, min(start + step, tensor.rows))
        blocks, values = tensor.blocks()[rows], np.ascontiguousarray(tensor.dequantise(rows)).reshape(-1)
        raw.update(np.ascontiguousarray(blocks).reshape(-1).data)
        hashed.update(values.view(np.uint8).data)
        drop_pages(tensor.blocks()[: rows.stop])  # from the start: reading on maps again what lies behind
        finite = values
        if not np.isfinite(values).all():
            nan, inf = nan + int(np.isnan(values).sum()), inf + int(np.isinf(values).sum())
            finite = values[np.isfinite(values)]
        if not finite.size:
            continue
        sample.append(finite[-count % stride :: stride].copy())  # a view would keep all of it
        zeros += int(finite.size - np.count_nonzero(finite))
        least, most = min(least, float(finite.min())), max(most, float(finite.max()))
        wide = finite.astype(np.float64)
        here = float(wide.mean())
        wide -= here
        apart, total = here - mean, count + finite.size
        squares += float(wide @ wide) + apart * apart * count * finite.size / total  # Chan, Golub and LeVeque
        mean += apart * finite.size / total
        count = total
    drop_pages(tensor.raw)
    if not count:
        return Fingerprint(tensor.name, tensor.type.name, tensor.shape, raw.hexdigest(), hashed.hexdigest(),
                           Statistics(tensor.size, None, None, None, None, (), 0, nan, inf, float("nan")))  # fmt: skip
    seen = Statistics(
        tensor.size, mean, (squares / count) ** 0.5, least, most,
        tuple(float(p) for p in np.percentile(np.concatenate(sample), PERCENTILES)), zeros, nan, inf, mean * count,
    )  # fmt: skip
    return Fingerprint(tensor.name, tensor.type.name, tensor.shape, raw.hexdigest(), hashed.hexdigest(), seen)


def fingerprint_table(prints: Sequence[Fingerprint], title: str) -> Comparison:
    """Fingerprints as a table; `equal` says that all values are finite."""
    rows = [{**p.row(), "equal": not (p.seen.nan or p.seen.inf)} for p in prints]
    bad = [row["name"] for row in rows if not row["equal"]]
    first = next((n for n, row in enumerate(rows) if not row["equal"]), None)
    summary = f"{len(rows)} tensors" + (f", {len(bad)} with values that are not finite, first {bad[0]}" if bad else "")
    return Comparison(title, COLUMNS, rows, not bad, summary, first)


def compare_fingerprints(a: Sequence[Fingerprint], b: Sequence[Fingerprint], title: str = "a against b") -> Comparison:
    """Two lists of fingerprints over the union of their names.

    `equal` is the raw blocks' (and the type's); beside it stand the decoded values' hash, the statistics, and what
    upstream's order-blind sum says, which calls a transposed tensor equal.
    """
    left, right = ({p.name: p for p in side} for side in (a, b))
    rows: list[dict[str, Any]] = []
    for name in [*left, *(name for name in right if name not in left)]:
        x, y = left.get(name), right.get(name)
        if x is None or y is None:
            rows.append({"name": name, "finding": "only in b" if x is None else "only in a", "equal": False})
            continue
        raw, values = x.raw == y.raw and x.type == y.type, x.values == y.values and x.shape == y.shape
        rows.append({
            "name": name, "finding": "same" if raw and values else "values" if not values else "blocks",
            "a": f"{x.type} {x.raw}", "b": f"{y.type} {y.raw}", "raw": raw, "values": values,
            "statistics": _close(x.seen, y.seen), "sum": _near(x.seen.total, y.seen.total, (x.seen.std or 0) * x.seen.count**0.5),
            "equal": raw and values,
        })  # fmt: skip
    if not rows:
        raise UsageError(f"{title}: nothing to compare")
    differing = [n for n, row in enumerate(rows) if not row["equal"]]
    summary = f"{len(rows)} tensors compared, {len(rows) - len(differing)} equal bit for bit"
    if differing:
        summary += f", first difference at {rows[differing[0]]['name']}"
    columns = ("name", "finding", "a", "b", "raw", "values", "statistics", "sum")
    return Comparison(title, columns, rows, not differing, summary, differing[0] if differing else None)


def _close(a: Statistics, b: Statistics) -> bool:
    """Whether the order-blind figures agree to seven digits of the spread."""
    if (a.nan, a.inf, a.zeros, a.count) != (b.nan, b.inf, b.zeros, b.count) or a.std is None or b.std is None:
        return a == b
    pairs = [(a.mean, b.mean), (a.std, b.std), (a.min, b.min), (a.max, b.max)]
    return all(_near(x, y, a.std) for x, y in pairs)


def _near(x: float | None, y: float | None, scale: float) -> bool:
    return x is not None and y is not None and abs(x - y) <= 1e-6 * (scale + abs(x) * 1e-3)


def transposed_unseen(tensor: Tensor) -> dict[str, bool]:
    """What sees that a matrix was transposed: upstream's sum and the statistics do not, the hash does (GH-202)."""
    if len(tensor.shape) != 2:
        raise UsageError("only a matrix can be transposed", tensor=tensor.name)
    values = tensor.dequantise()
    other = np.ascontiguousarray(values.T).reshape(values.shape)
    a, b = statistics(values), statistics(other)
    scale = (a.std or 0) * a.count**0.5
    return {
        "sum": not _near(a.total, b.total, scale), "statistics": not _close(a, b),
        "hash": checksum(values) != checksum(other),
    }  # fmt: skip


def diff(a: Model | str | Path, b: Model | str | Path) -> Comparison:
    """Every tensor of the union, every config value, every part of the tokenizer: `aprlab.compare.compare_models`."""
    with contextlib.ExitStack() as stack:
        return compare_models(*(s if isinstance(s, Model) else stack.enter_context(Model.open(s)) for s in (a, b)))


