"""Files by URL: read in ranges from a loopback server that behaves well, fails, truncates, ignores ranges or changes the file."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import write
from made import shard

from aprlab.cli.app import run_cli
from aprlab.conversion import convert
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.formats import identify, open_model
from aprlab.inference import Session
from aprlab.instruments import diff, fingerprint, fingerprints
from aprlab.model import remote
from aprlab.onion.peeling import peel


class Server(ThreadingHTTPServer):
    """Serves one file at every path, or `files` by their names; `mode` says how."""

    daemon_threads = True

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.data, self.mode, self.asked, self.sent, self.version = data, "well", 0, 0, "1"
        self.files: dict[str, bytes] = {}
        self.failed: dict[str, int] = {}  # range -> how often it was refused
        self.url = f"http://127.0.0.1:{self.server_address[1]}/models/m.gguf"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked += 1
        mode, data = server.mode, server.data
        if server.files:
            data = server.files.get(self.path.rpartition("/")[2], b"")
            mode = mode if data else "missing"
        wanted = f"{self.path} {self.headers['Range']}"
        server.failed[wanted] = server.failed.get(wanted, 0) + 1
        again = server.failed[wanted] <= 2  # each range is refused twice
        if mode == "missing":
            self.send_error(404)
            return
        if mode == "busy" or (mode == "flaky" and again):
            self.send_error(503)
            return
        if mode == "drops" or (mode == "drops often" and again):
            self.connection.close()
            return
        if mode == "ignores":
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            self.wfile.write(data[:100])
            return
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        if mode == "shifts":
            first += 1
        part = data[first : last + 1]
        if mode == "changes" and first > 0:
            server.version = str(server.asked)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", server.version)
        self.end_headers()
        if mode == "truncates" or (mode == "truncates often" and again):
            part = part[: len(part) // 2]
        server.sent += len(part)
        self.wfile.write(part)


@pytest.fixture
def server(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "WAIT", 0.001)
    remote.forget()
    with Server(tiny.read_bytes()) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_a_path_that_is_a_url() -> None:
    assert remote.url_of(Path("https://host/a/b.gguf")) == "https://host/a/b.gguf"
    assert remote.url_of("s3://bucket/x.gguf") == "s3://bucket/x.gguf"
    assert remote.url_of(Path("hf://Qwen/x/y.gguf")) == "hf://Qwen/x/y.gguf"
    for path in ("model.gguf", "/a/https/b", "c:/models/x.gguf", "https", "http:"):
        assert remote.url_of(path) is None


def test_header_and_single_blocks_are_read_without_the_file(server: Server, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aprlab.formats.gguf.FIRST_READ", 1 << 12)  # the header is longer: it is fetched in steps
    local, model = open_model(tiny), open_model(server.url)
    assert list(model.tensors) == list(local.tensors) and model.config == local.config and model.tokenizer == local.tokenizer
    size = tiny.stat().st_size
    header = model.header["data_offset"]
    assert server.sent < 2 * header + (1 << 13) < size / 2
    before = server.sent
    name = "blk.1.ffn_down.weight"
    assert np.array_equal(model.tensor(name).dequantise(slice(3, 5)), local.tensor(name).dequantise(slice(3, 5)))
    assert server.sent - before == 2 * local.tensor(name).nbytes // local.tensor(name).rows
    assert model.tensor(name).raw.tobytes() == local.tensor(name).raw.tobytes()
    assert not model.tensor(name).in_file


@pytest.mark.parametrize("mode", ["flaky", "drops often", "truncates often"])
def test_what_breaks_now_and_then_is_asked_for_again(server: Server, tmp_path: Path, mode: str) -> None:
    local = write(tmp_path / "f.gguf", "falcon")
    server.mode, server.data = mode, local.read_bytes()
    remote_print, own = fingerprint(open_model(server.url)), fingerprint(open_model(local))
    assert [p.raw for p in remote_print] == [p.raw for p in own]
    assert server.asked > len(own)


@pytest.mark.parametrize(
    ("mode", "code", "says"),
    [
        ("missing", "remote.not-found", "404"),
        ("busy", "remote.unreachable", "503"), ("drops", "remote.unreachable", "cannot be"),
        ("ignores", "remote.no-ranges", "ignores ranges"), ("shifts", "remote.other-range", "another range"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_serve_is_refused_in_one_line(server: Server, mode: str, code: str, says: str) -> None:
    server.mode = mode
    for ask in (open_model, fingerprint):
        with pytest.raises(UsageError, match=says) as caught:
            ask(server.url)
        assert caught.value.code == code and "\n" not in str(caught.value)
    assert identify(server.url).code == code
    assert server.sent <= 200


@pytest.mark.parametrize(("mode", "code"), [("truncates", "remote.unreadable"), ("changes", "remote.changed")])
def test_what_goes_wrong_later_is_an_error_and_never_other_bytes(server: Server, mode: str, code: str) -> None:
    model = open_model(server.url)
    server.mode = mode
    with pytest.raises(AprlabError) as caught:
        model.tensor("blk.0.attn_q.weight").dequantise()
    assert caught.value.code == code
    with pytest.raises(FormatError):
        remote.open_url(server.url).read(0, 1 << 40)


def test_what_is_no_gguf_is_named(server: Server) -> None:
    for data, code in (
        (b"<!DOCTYPE html><title>Sign in</title>" * 9, "identity.html-page"), (b"APR\0" + bytes(99), "apr.unsupported-version"),
        (b"APR\0\2\0\1\0" + bytes(99), "apr.parts-out-of-order"),
        (b"\xff" * 4 + bytes(4) + b"{", "safetensors.header-too-large"),
        (b"\x20" + bytes(7) + b"{" + b" " * 31, "reading.bad-json"),
        (b"nonsense" * 9, "formats.unknown-format"), (b"GGUF\3\0\0\0" + b"\xff" * 16, "gguf.implausible-count"),
    ):  # fmt: skip
        remote.forget()
        server.files = {"m.gguf": data}
        with pytest.raises(AprlabError) as caught:
            open_model(server.url)
        assert caught.value.code == code


def test_diff_of_headers_reads_no_tensor(server: Server, tiny: Path, tmp_path: Path) -> None:
    header = open_model(tiny).header["data_offset"]
    found = diff(server.url, tiny, headers=True)
    assert found.equal and {row["code"] for row in found.rows} == {"diff.not-read", "diff.same"}
    assert server.sent < header + (1 << 20) + 5000
    convert(tiny, tmp_path / "q.gguf", quantize="q8_0")
    assert {"diff.type"} < {row["code"] for row in diff(server.url, tmp_path / "q.gguf", headers=True).rows}
    assert diff(server.url, tiny).equal  # and with them, byte for byte


def test_converted_from_a_url_it_is_the_same_file(server: Server, tiny: Path, tmp_path: Path) -> None:
    assert convert(server.url, tmp_path / "a.apr").reversible
    convert(tiny, tmp_path / "b.apr")
    assert diff(tmp_path / "a.apr", tmp_path / "b.apr").equal


def test_it_is_not_run_or_peeled(server: Server, tiny: Path) -> None:
    with pytest.raises(UsageError, match="is a URL"):
        Session(open_model(server.url))
    with pytest.raises(UsageError, match="is a URL"):
        peel(tiny, server.url)


def test_the_command_line(server: Server, tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["inspect", server.url, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["identity"]["kind"] == "model" and len(found["tensors"]) == len(open_model(tiny).tensors)
    assert run_cli(["diff", server.url, str(tiny)]) == 0
    assert "only headers" in capfd.readouterr().err
    server.mode = "missing"
    remote.forget()
    assert run_cli(["inspect", server.url]) == 2
    assert "404" in capfd.readouterr().err


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The embedded model in other forms: the folder whose files are served, and what is asked for in it."""
    root = tmp_path_factory.mktemp("forms")
    (root / "apr").mkdir()
    convert(tiny, root / "apr" / "m.apr")
    shutil.copytree(folders["bf16"], root / "shards")
    shard(root / "shards")
    return {
        "apr": (root / "apr", "m.apr"), "safetensors": (folders["bf16"], "model.safetensors"),
        "folder": (folders["bf16"], ""), "index": (root / "shards", "model.safetensors.index.json"),
        "shards": (root / "shards", ""),
    }  # fmt: skip


FORMS = ("apr", "safetensors", "folder", "index", "shards")


@pytest.fixture
def form(request: pytest.FixtureRequest, server: Server, made: dict[str, tuple[Path, str]]) -> tuple[str, Path]:
    """URL and path of the same model in one form."""
    folder, name = made[request.param]
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.url = server.url.rpartition("/")[0] + (f"/{name}" if name else "")
    return server.url, folder / name if request.param in ("apr", "safetensors") else folder


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_other_forms_are_read_in_ranges(server: Server, form: tuple[str, Path]) -> None:
    url, path = form
    local, model = open_model(path), open_model(url)
    assert list(model.tensors) == list(local.tensors) and model.config == local.config and model.tokenizer == local.tokenizer
    size = sum(t.nbytes for t in local.tensors.values())
    texts = sum(len(data) for name, data in server.files.items() if name.endswith(".json"))  # config, tokenizer: whole
    assert server.sent < texts + (1 << 19) < texts + size / 2
    before, name = server.sent, "blk.1.ffn_down.weight"
    assert np.array_equal(model.tensor(name).dequantise(slice(3, 5)), local.tensor(name).dequantise(slice(3, 5)))
    assert server.sent - before == 2 * local.tensor(name).nbytes // local.tensor(name).rows
    before = server.sent
    found = diff(model, path, headers=True)
    assert found.equal and server.sent == before


@pytest.mark.parametrize("form", ["apr", "shards"], indirect=True)
def test_fingerprints_fetch_every_byte_once(server: Server, form: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, path = form
    model = open_model(url)
    for large in (fingerprints.LARGE, 1 << 14):
        monkeypatch.setattr(fingerprints, "LARGE", large)
        before = server.sent
        assert [(p.raw, p.values) for p in fingerprint(model)] == [(p.raw, p.values) for p in fingerprint(path)]
        assert server.sent - before == model.nbytes


@pytest.mark.parametrize("form", ["apr", "index"], indirect=True)
@pytest.mark.parametrize(
    ("mode", "code"),
    [
        ("flaky", ""), ("drops often", ""), ("truncates often", ""), ("busy", "remote.unreachable"),
        ("drops", "remote.unreachable"),
        ("ignores", "remote.no-ranges"), ("shifts", "remote.other-range"), ("missing", "remote.not-found"),
        ("changes", "remote.changed"), ("truncates", "remote.unreadable"),
    ],
)  # fmt: skip
def test_other_forms_from_a_bad_server(server: Server, form: tuple[str, Path], mode: str, code: str) -> None:
    url, path = form
    name = "blk.0.attn_q.weight"
    if mode in ("changes", "truncates"):
        model = open_model(url)
        server.mode = mode
        with pytest.raises(AprlabError) as caught:
            model.tensor(name).dequantise()
        assert caught.value.code == code and "\n" not in str(caught.value)
        return
    server.mode = mode
    if not code:
        assert np.array_equal(open_model(url).tensor(name).dequantise(), open_model(path).tensor(name).dequantise())
        return
    for ask in (open_model, fingerprint):
        with pytest.raises(UsageError) as caught:
            ask(url)
        assert caught.value.code == code and "\n" not in str(caught.value)
    assert identify(url).code == code


def test_what_cannot_be_had_in_ranges_is_said(server: Server, made: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    folder, _ = made["apr"]
    convert(folder / "m.apr", tmp_path / "z.apr", compress="zstd")
    shards = made["shards"][0]
    base = server.url.rpartition("/")[0]
    damaged = bytearray((folder / "m.apr").read_bytes())
    damaged[-100] ^= 1
    server.files = {path.name: path.read_bytes() for path in shards.iterdir()} | {
        "z.apr": (tmp_path / "z.apr").read_bytes(), "m.apr": bytes(damaged),
    }  # fmt: skip
    part = next(name for name in server.files if "-00002-of" in name)
    del server.files["config.json"]
    for name, code in (
        ("z.apr", "apr.compressed-by-url"), (part, "identity.part-of-several"),
        ("model.safetensors.index.json", "huggingface.missing-file"),
        ("", "remote.not-found"), ("none.apr", "remote.not-found"),
    ):  # fmt: skip
        with pytest.raises(AprlabError) as caught:
            open_model(f"{base}/{name}")
        assert caught.value.code == code and "\n" not in str(caught.value)
    assert any("CRC-32 is not checked" in line for line in open_model(f"{base}/m.apr").warnings)


def test_a_split_model_and_another_architecture_by_url(server: Server, tmp_path: Path) -> None:
    server.data = write(tmp_path / "f.gguf", "falcon").read_bytes()
    model = open_model(server.url)
    assert "'falcon'" in model.warnings[0] and diff(model, tmp_path / "f.gguf").equal


def test_other_schemes_go_through_fsspec(tiny: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    remote.forget()
    fsspec.filesystem("memory").pipe("/x/m.gguf", tiny.read_bytes())
    assert diff("memory://x/m.gguf", tiny).equal
    for path in folders["bf16"].iterdir():
        fsspec.filesystem("memory").pipe(f"/hf/{path.name}", path.read_bytes())
    for url in ("memory://hf", "memory://hf/", "memory://hf/model.safetensors"):
        assert diff(url, folders["bf16"]).equal
    remote.forget()
    with pytest.raises(UsageError) as caught:
        open_model("memory://x/none.gguf")
    assert caught.value.code == "remote.not-found"
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(UsageError, match=r"aprlab\[remote\]") as caught:
        open_model("s3://bucket/m.gguf")
    assert caught.value.code == "remote.not-installed"
