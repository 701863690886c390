"""The stored corpus through every target, and a short coverage-guided run of each (`fuzz.py` for long ones)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import campaign  # noqa: E402
from fuzz import CORPUS  # noqa: E402
from mutants import Count, mutants, sweep  # noqa: E402
from targets import CORPUS_OF, TARGETS, run  # noqa: E402

RUNS = 250
STORED = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", STORED)
def test_the_corpus_is_read_or_refused(name: str) -> None:
    outcome = run(name.split("/")[0], (CORPUS / name).read_bytes())
    assert (outcome == "ok") == ("refused" not in name), outcome


def test_each_target_has_a_sound_file_to_start_from() -> None:
    assert {name.split("/")[0] for name in STORED if "refused" not in name} == {CORPUS_OF.get(name, name) for name in TARGETS}


# Without the bounds check the fuzzer must find something, or it looks at nothing.
MUTANT = "from aprlab.formats import reading; reading.Cursor.need = lambda self, n, what: self.offset"
SHORT_RUNS = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
import fuzz
fuzz.instrument()
for label in sys.argv[2:]:
    place = Path(sys.argv[1]) / label
    place.mkdir()
    if not (child := os.fork()):
        os.dup2(os.open(place / "log", os.O_WRONLY | os.O_CREAT), 2)
        name, _, mutant = label.partition(" ")
        if mutant:
            {MUTANT}
        fuzz.fuzz(name, 60, 1, place / "found", place / "grown", runs={RUNS})
    (place / "status").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@dataclass(frozen=True)
class ShortRun:
    """How a short run of a target ended: the exit status, libFuzzer's log, the inputs that it found."""

    status: int
    log: str
    found: list[Path]


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShortRun]:
    """Coverage-guided runs of all targets, and of a mutant, each in a child of one process: the instrumented imports,
    most of the cost, are made once."""
    pytest.importorskip("atheris", reason="atheris has no wheel here")
    place, labels = tmp_path_factory.mktemp("runs"), [*TARGETS, "safetensors mutant"]
    done = subprocess.run([sys.executable, "-c", SHORT_RUNS, str(place), *labels], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for label in labels:
        status, log = int((place / label / "status").read_text()), (place / label / "log").read_text(errors="replace")
        found[label] = ShortRun(status, log, list((place / label / "found").iterdir()))
    return found


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_short_run_finds_nothing(name: str, short_runs: dict[str, ShortRun]) -> None:
    run = short_runs[name]
    assert run.status == 0, run.log[-3000:]
    assert f"stat::number_of_executed_units: {RUNS}" in run.log and not run.found


def test_a_run_finds_a_reader_that_reads_past_the_end(short_runs: dict[str, ShortRun]) -> None:
    run = short_runs["safetensors mutant"]
    assert run.status != 0 and run.found


@pytest.mark.parametrize("name", list(TARGETS))
def test_mutants_are_read_or_refused(name: str) -> None:
    """A share of `campaign.py`'s, bounded by count: about 10 seconds of the processor in all; see docs/trust.md."""
    most = {"yaml": 200, "ptx": 500}.get(name, 1000)
    count: Count = sweep(name, mutants_at_most=most, seconds=1e9, seed=3)
    assert count.found == [], count.found[0]
    assert count.mutants >= most and count.refused > count.mutants // 20, count


def test_a_mutant_that_breaks_a_reader_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the bounds check of the cursor the mutants must find something, or they look at nothing."""
    from aprlab.formats import reading

    monkeypatch.setattr(reading.Cursor, "need", lambda self, nbytes, what: self.offset)
    assert sweep("safetensors", mutants_at_most=3000, seconds=20.0, seed=3).found


def test_mutants_are_the_same_for_a_seed() -> None:
    first, again, other = (list(mutants(b"some bytes to change" * 9, 50, seed)) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) > 45


def kept(data: bytes) -> str:
    return data.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits of Linux")
def test_a_campaign_sees_what_hangs_eats_memory_breaks_or_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four mutants that are neither read nor refused, among two that are; the run goes on after each."""
    monkeypatch.setattr(campaign, "SECONDS", 0.3)

    def look(data: bytes) -> str:
        match data:
            case b"hangs":
                while True:
                    pass
            case b"eats":
                return str(len(bytearray(400_000_000)))
            case b"breaks":
                raise KeyError
            case b"ends":
                os._exit(7)
        return "ok" if data == b"sound" else "FormatError"

    seen = campaign.Seen()
    campaign.run_batch(seen, [b"sound", b"hangs", b"eats", b"refused", b"ends", b"breaks", b"sound"], look, kept)
    assert (seen.mutants, seen.read, seen.refused, seen.neither) == (7, 2, 1, 4)
    firsts = {kind.split(" at ")[0]: first for kind, (_, first) in seen.kinds.items()}
    assert firsts == {"Slow": "hangs", "MemoryError": "eats", "KeyError": "breaks", "the process ended: status 7": "ends"}


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits of Linux")
def test_a_campaign_that_was_stopped_goes_on(tmp_path: Path) -> None:
    def run_to(total: int, state: str) -> dict[str, campaign.Seen]:
        return campaign.campaign(tmp_path / state, total, 5, tmp_path, size=20, only=("safetensors", "npz"))

    run_to(150, "s.json")
    stopped, whole = run_to(400, "s.json"), run_to(400, "t.json")
    for name in ("safetensors", "npz"):
        one, other = stopped[name], whole[name]
        assert (one.mutants, one.read, one.refused) == (other.mutants, other.read, other.refused)
        assert one.mutants >= 400 * campaign.SHARES[name] // 100 and not one.neither
