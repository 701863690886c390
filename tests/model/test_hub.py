"""`fetch` against a hub on the loopback that is sound, breaks off, goes away, or lies about what it has."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

from aprlab.cli.app import run_cli
from aprlab.errors import FormatError, UsageError
from aprlab.model import hub
from aprlab.published import KnownModel

CONTENT = np.random.default_rng(5).bytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
FILE = "tiny-q4_k_m.gguf"


@dataclass
class Hub:
    """What the server has and how it behaves."""

    url: str = ""
    content: bytes = CONTENT
    announced: str = SHA
    size: int | None = None
    status: int = 200
    stop_after: int | None = None
    ranges: bool = True
    extra: int = 0  # bytes sent behind what was announced
    encoding: str = ""
    sent: int = 0
    gets: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            state.gets.append(self.headers.get("Range"))
            self.answer(head=False)

        def answer(self, *, head: bool) -> None:
            if state.status != 200 or self.path != f"/owner/tiny/resolve/main/{FILE}":
                self.send_response(404 if state.status == 200 else state.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body, code = state.content, 200
            if not head and state.ranges and (wanted := self.headers.get("Range")):
                first = int(wanted.removeprefix("bytes=").split("-")[0])
                body, code = body[first:], 206
                self.protocol_version = "HTTP/1.1"
            if not head and state.stop_after is not None:
                body = body[: state.stop_after]
            self.send_response(code)
            size = len(state.content) if state.size is None else state.size
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{state.announced}"')
            self.send_header("X-Linked-Etag", f'"{state.announced}"')
            self.send_header("X-Linked-Size", str(size))
            if state.encoding and not head:
                self.send_header("Content-Encoding", state.encoding)
            self.send_header("Content-Length", str(size if head else len(body) + state.extra))
            self.end_headers()
            if not head:
                self.wfile.write(body)
                with suppress(OSError):
                    while state.sent < state.extra:
                        state.sent += self.wfile.write(bytes(1 << 16))

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield state
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(params=[True, False], ids=["hash known", "hash unknown"])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model of the server's; of some models the hash is in models.toml, of others only the hub knows it."""
    sure = {"bytes": len(CONTENT), "sha256": SHA} if request.param else {}
    model = KnownModel("tiny", "Tiny", "owner/tiny", FILE, {}, {}, **sure)  # type: ignore[arg-type]
    monkeypatch.setattr(hub, "known_model", lambda name: model)
    return model


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".sha256"))


def test_fetched_once_and_then_found(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    first = hub.fetch("tiny", folder=tmp_path / "models", endpoint=server.url)
    assert first.fetched and first.resumed == 0 and first.sha256 == SHA
    assert first.path.read_bytes() == CONTENT and files(tmp_path / "models") == [FILE]
    assert len(server.gets) == 1
    again = hub.fetch("tiny", folder=tmp_path / "models", endpoint="http://127.0.0.1:9", offline=True)
    assert not again.fetched and again.path == first.path
    forced = hub.fetch("tiny", folder=tmp_path / "models", endpoint=server.url, force=True)
    assert forced.fetched and len(server.gets) == 2


def test_a_broken_download_goes_on_where_it_stopped(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    server.stop_after = 100_000
    with pytest.raises(hub.FetchError, match="100000 of 300000 bytes"):
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    assert [name.endswith(".part") for name in files(tmp_path)] == [True]
    server.stop_after = None
    done = hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    assert done.resumed == 100_000 and server.gets[-1] == "bytes=100000-"
    assert done.path.read_bytes() == CONTENT and files(tmp_path) == [FILE]


def test_a_server_that_does_not_resume_starts_over(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    server.stop_after = 100_000
    with pytest.raises(hub.FetchError):
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    server.stop_after, server.ranges = None, False
    assert hub.fetch("tiny", folder=tmp_path, endpoint=server.url).path.read_bytes() == CONTENT


def test_a_part_of_other_content_is_not_taken(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    """The remains of a damaged download lead to a refusal, and to a sound file on the next try."""
    part = tmp_path / f".{FILE}.{SHA[:12]}.part"
    part.write_bytes(b"\0" * 5000)
    with pytest.raises(FormatError, match="nothing was kept"):
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    assert files(tmp_path) == []
    assert hub.fetch("tiny", folder=tmp_path, endpoint=server.url).path.read_bytes() == CONTENT
    part.write_bytes(b"\0" * (len(CONTENT) + 1))  # longer than the file itself
    assert hub.fetch("tiny", folder=tmp_path, endpoint=server.url, force=True).path.read_bytes() == CONTENT


def test_a_server_that_lies_about_the_hash(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    """Same size, other bytes: never in the place of a good file, forced or not."""
    (tmp_path / FILE).write_bytes(CONTENT)
    server.content = bytes(reversed(CONTENT))
    with pytest.raises(FormatError, match=f"expected {SHA}; nothing was kept"):
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url, force=True)
    assert (tmp_path / FILE).read_bytes() == CONTENT and files(tmp_path) == [FILE]


def test_a_hub_with_another_file(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hash is known here, the hub's own word does not count, and nothing is fetched."""
    model = KnownModel("tiny", "Tiny", "owner/tiny", FILE, {}, {}, bytes=len(CONTENT), sha256=SHA)
    monkeypatch.setattr(hub, "known_model", lambda name: model)
    server.content = bytes(reversed(CONTENT))
    server.announced = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(FormatError, match="the known one has"):
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    server.announced, server.size = SHA, 10
    with pytest.raises(FormatError, match="of size 10"):
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    assert files(tmp_path) == [] and server.gets == []


def test_a_bad_file_in_its_place_is_reported_and_kept_until_forced(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"something else")
    with pytest.raises(UsageError, match="is here, but its SHA-256"):
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    assert (tmp_path / FILE).read_bytes() == b"something else"
    assert hub.fetch("tiny", folder=tmp_path, endpoint=server.url, force=True).path.read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "message"), [(404, "has no owner/tiny"), (401, "requires a login"), (500, "HTTP 500")])
def test_errors_of_the_hub(status: int, message: str, server: Hub, known: KnownModel, tmp_path: Path) -> None:
    server.status = status
    with pytest.raises(hub.FetchError, match=message) as caught:
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    assert "\n" not in str(caught.value) and files(tmp_path) == []


def test_no_hash_no_file(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    server.announced = "abc"
    with pytest.raises(hub.FetchError, match="gives no SHA-256"):
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)


def test_without_network(known: KnownModel, tmp_path: Path) -> None:
    with pytest.raises(hub.FetchError, match="cannot be reached") as caught:
        hub.fetch("tiny", folder=tmp_path, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is not here"):
        hub.fetch("tiny", folder=tmp_path, offline=True)


def test_a_hub_that_sends_more_than_it_announced(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    """1 MB announced and 64 times as much sent: cut off, and nothing of it kept."""
    server.extra = 64 * len(CONTENT)
    with pytest.raises(hub.FetchError, match=r"more than the 300000 bytes that it announced.*nothing is kept") as caught:
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    assert caught.value.code == "hub.too-long"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0
    assert server.sent < 8 * 2**20  # what the sockets hold, not all that the hub has
    server.extra = 0
    assert hub.fetch("tiny", folder=tmp_path, endpoint=server.url).path.read_bytes() == CONTENT


def test_a_hub_that_sends_a_gzip_bomb(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    """Nothing is unpacked: a body with Content-Encoding is refused before it is read."""
    server.encoding = "gzip"
    with pytest.raises(hub.FetchError, match=r"packed \(gzip\)") as caught:
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)
    assert caught.value.code == "hub.content-encoding"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0


def test_two_at_once(server: Hub, known: KnownModel, tmp_path: Path) -> None:
    with hub._alone(tmp_path / f".{FILE}.{SHA[:12]}.part"), pytest.raises(UsageError, match="another process"):
        hub.fetch("tiny", folder=tmp_path, endpoint=server.url)


def test_the_verb(server: Hub, known: KnownModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["fetch", "tiny", "--dir", str(tmp_path), "--endpoint", server.url]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / FILE)
    assert run_cli(["fetch", "tiny", "--dir", str(tmp_path / "no"), "--offline"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aprlab: ") and error.count("\n") == 1
