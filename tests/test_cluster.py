"""A Dask cluster of two workers on this machine: the same results as without it, and one line for what goes wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aprlab import cluster
from aprlab.cli.app import run_cli
from aprlab.conversion import convert
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.formats import open_model
from aprlab.instruments import diff, fingerprint
from aprlab.qualification.certificate import _check_values_by, verify

distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'aprlab[cluster]'")


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as found:
        yield found


@pytest.fixture(scope="module")
def address(workers: Any) -> str:
    return str(workers.scheduler_address)


def die_once(marker: str) -> int:
    """Takes its worker with it the first time."""
    if not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(1)
    return 7


def die(where: int) -> None:
    os._exit(1)


def refuse(number: int) -> int:
    if number == 1:
        raise FormatError("is wrong", code="reading.truncated", path="x.gguf", offset=3)
    return number


def test_the_same_fingerprints_by_two_workers(address: str, tiny: Path) -> None:
    seen: list[int] = []
    found = fingerprint(tiny, seen.append, scheduler=address)
    assert found == fingerprint(tiny)
    assert sum(seen) == open_model(tiny).nbytes and len(seen) > 2


def test_the_same_differences_by_two_workers(address: str, tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "q.gguf", quantize="q8_0")
    data = bytearray(tiny.read_bytes())
    data[open_model(tiny).tensor("blk.1.ffn_up.weight").origin.offset + 5] ^= 1
    (tmp_path / "bit.gguf").write_bytes(data)
    for other in (tiny, tmp_path / "q.gguf", tmp_path / "bit.gguf"):
        found, own = diff(tiny, other, scheduler=address), diff(tiny, other)
        assert found.rows == own.rows and found.equal == own.equal == (other == tiny)


def test_the_command_line_says_the_same(address: str, tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = []
    for more in ([], ["--scheduler", address]):
        assert run_cli(["fingerprint", str(tiny), "--json", *more]) == 0
        assert run_cli(["diff", str(tiny), str(tiny), *more]) == 0
        said.append(capfd.readouterr().out)
    assert said[0] == said[1]


def test_the_same_certificate_by_two_workers(address: str, tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "q.gguf", quantize="q8_0")
    found, own = (verify(tiny, tmp_path / "q.gguf", tokens=96, scheduler=where) for where in (address, None))
    assert [check.to_json() for check in found.checks] == [check.to_json() for check in own.checks]
    data = bytearray((tmp_path / "q.gguf").read_bytes())
    for name in ("blk.2.ffn_up.weight", "blk.0.ffn_down.weight"):  # two scales that are no number, the first in the file is named
        at = open_model(tmp_path / "q.gguf").tensor(name).origin.offset
        data[at : at + 2] = b"\x00\x7e"
    (tmp_path / "bad.gguf").write_bytes(data)
    with open_model(tmp_path / "bad.gguf") as model, cluster.connect(address) as both:
        with pytest.raises(FormatError) as caught:
            _check_values_by(both, model)
        with pytest.raises(FormatError) as here:
            model.check_values()
    assert str(caught.value) == str(here.value) and "blk.0.ffn_down" in str(caught.value)


def test_a_worker_that_dies_is_replaced(address: str, tmp_path: Path) -> None:
    with cluster.connect(address) as both:
        assert both.map(die_once, [str(tmp_path / "died")]) == [7]
        assert (tmp_path / "died").exists()


def test_what_a_worker_raises_is_raised_here(address: str) -> None:
    with cluster.connect(address) as both, pytest.raises(FormatError) as caught:
        both.map(refuse, [0, 1, 2])
    assert str(caught.value) == "x.gguf, offset 3: is wrong" and caught.value.code == "reading.truncated"


def test_a_worker_that_sees_another_file_is_named(
    address: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = cluster.token_of
    monkeypatch.setattr(cluster, "token_of", lambda path: own(path) + "; once more")
    with pytest.raises(UsageError, match="sees another file") as caught:
        fingerprint(tiny, scheduler=address)
    assert caught.value.code == "cluster.file" and "\n" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(cluster, "__version__", "0.0.1")
    with pytest.raises(UsageError, match=r"has aprlab .*, this is 0\.0\.1") as caught:
        fingerprint(tiny, scheduler=address)
    assert caught.value.code == "cluster.version"


def test_a_folder_is_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    before = cluster.token_of(str(tmp_path))
    (tmp_path / "a").write_bytes(b"2")
    assert before != cluster.token_of(str(tmp_path)) and "not readable" in cluster.token_of(str(tmp_path / "b"))
    assert cluster.path_on_all("https://host/x.gguf") == "https://host/x.gguf"


def test_what_is_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setattr(cluster, "CONNECT", "300ms")
    for address in ("nonsense://here:1", "tcp://127.0.0.1:9", ""):
        with pytest.raises(UsageError, match="no Dask scheduler at") as caught:
            diff(tiny, tiny, scheduler=address)
        assert caught.value.code == "cluster.no-scheduler" and "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(UsageError, match=r"aprlab\[cluster\]"):
        fingerprint(tiny, scheduler="tcp://127.0.0.1:9")


def test_workers_that_are_gone_are_said(workers: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test here: it leaves no worker."""
    monkeypatch.setattr(cluster, "ALONE", 0.1)
    monkeypatch.setattr(cluster, "LOOK", 0.2)
    with cluster.connect(address) as both:
        workers.scale(0)
        with pytest.raises(AprlabError, match="lost all its workers; 1 of 1 parts") as caught:
            both.map(die, [0])
    assert caught.value.code == "cluster.no-workers-left"
    ends, said = time.monotonic() + 20, ""
    while "has no workers" not in said:  # the nanny of a worker that died starts one more before it hears that it shall not
        assert time.monotonic() < ends
        try:
            with cluster.connect(address):
                time.sleep(0.2)
        except UsageError as error:
            said = str(error)
