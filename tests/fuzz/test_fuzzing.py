"""The stored corpus through every target, and a short coverage-guided run of each (`fuzz.py` for long ones)."""

from __future__ import annotations

import os
import subprocess
import sys
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


def fuzz(name: str, place: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import fuzz\n{before}\nfrom pathlib import Path\n"
    code += f"fuzz.fuzz({name!r}, 60, 1, Path({str(place)!r}) / 'found', Path({str(place)!r}) / 'grown', runs={RUNS})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel here")
    done = fuzz(name, tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "stat::number_of_executed_units" in done.stderr and not list((tmp_path / "found").iterdir())


def test_a_run_finds_a_reader_that_reads_past_the_end(tmp_path: Path) -> None:
    """Without the bounds check the fuzzer must find something, or it looks at nothing."""
    pytest.importorskip("atheris", reason="atheris has no wheel here")
    mutant = "from aprlab.formats import reading\nreading.Cursor.need = lambda self, n, what: self.offset"
    done = fuzz("safetensors", tmp_path, mutant)
    assert done.returncode != 0 and list((tmp_path / "found").iterdir())


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
