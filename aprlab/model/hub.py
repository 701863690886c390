"""Known models from the Hugging Face hub: resumed, checked by SHA-256, and never a bad file in the place of a good one.

`huggingface_hub` speaks to the hub (addresses, tokens, redirects, retries); what has arrived is kept here in a ``.part`` file
until it is whole and its hash is right, so that an interrupted download goes on where it stopped.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from aprlab import paths
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.published import KnownModel, known_model

_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEP = 1 << 22
_CHUNK, _PATIENCE, _TRIES = 1 << 20, 10.0, 6  # bytes at a time, seconds without any, tries without progress


class FetchError(AprlabError):
    """The hub cannot be reached, or broke off; what has arrived is kept."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where the file is now. `fetched` is False where it was there already, `resumed` the bytes that an earlier try had left."""

    path: Path
    bytes: int
    sha256: str
    fetched: bool
    resumed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"path": str(self.path), "bytes": self.bytes, "sha256": self.sha256, "fetched": self.fetched,
                "resumed": self.resumed, "seconds": self.seconds}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Offer:
    """What the hub says of a file: its SHA-256 and size, and where to get it; whether that is at the hub itself."""

    sha256: str
    size: int
    url: str
    same_host: bool


def fetch(
    name: str,
    *,
    folder: str | Path | None = None,
    endpoint: str | None = None,
    offline: bool = False,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Fetched:
    """Bring a known model to this machine, or find that it is here.

    Args:
        name: of `data/models.toml`, e.g. ``qwen2.5-coder-0.5b``.
        folder: where models are kept; `paths.models_dir()` without.
        endpoint: address of the hub; ``HF_ENDPOINT`` or the public one without.
        offline: only look whether the file is here and sound.
        force: fetch again even where a file is here; it is replaced only by a sound one.
        progress: called with bytes hashed since the last call.

    Raises:
        UsageError: unknown name, not here and offline, a file of another content is in its place, no room on the disk,
            another process is fetching it, `huggingface_hub` is not installed.
        FetchError: no network, an error of the hub, a broken connection. A later call goes on.
        FormatError: what came is not what was announced; nothing of it is kept.
    """
    started = time.perf_counter()
    known = known_model(name)
    folder = Path(folder) if folder is not None else paths.models_dir()
    target, note = folder / known.file, folder / f"{known.file}.sha256"
    if target.is_file() and not force:
        found = _found_here(known, target, note, endpoint, offline, progress)
        return Fetched(target, target.stat().st_size, found, False, 0, time.perf_counter() - started)
    if offline:
        said = f"is not here; without --offline it would be fetched from {known.repository}"
        raise UsageError(said, code="hub.not-here", path=target)
    offer = _offer(known, endpoint)
    for what, ours, theirs in (("SHA-256", known.sha256, offer.sha256), ("size", known.bytes, offer.size)):
        if ours is not None and ours != theirs:
            said = f"the hub offers {known.file} of {what} {theirs}, the known one has {ours}; nothing was fetched"
            raise FormatError(said, code="hub.offer-unlike")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{known.file}.{offer.sha256[:12]}.part"
    with _alone(part) as file:
        resumed = _download(known, offer, file, part)
        found = sha256(part, progress)
        if found != offer.sha256:
            part.unlink()
            said = f"came with SHA-256 {found}, expected {offer.sha256}; nothing was kept"
            raise FormatError(said, code="hub.hash-arrived-unlike", path=target)
        os.fsync(file.fileno())
        os.replace(part, target)
    if known.sha256 is None:
        note.write_text(f"{found}  {known.file}\n")  # as sha256sum has it
    return Fetched(target, offer.size, found, True, resumed, time.perf_counter() - started)


def _found_here(
    known: KnownModel, target: Path, note: Path, endpoint: str | None, offline: bool, progress: Callable[[int], None] | None
) -> str:
    """SHA-256 of the file that is here, which must be the known one's."""
    expected = known.sha256 or _noted(note)
    if expected is None and offline:
        raise UsageError("is here, but its SHA-256 cannot be looked up without network", code="hub.hash-unknown", path=target)
    if expected is None:
        expected = _offer(known, endpoint).sha256
    found = sha256(target, progress)
    if found != expected:
        said = f"is here, but its SHA-256 is {found}, expected {expected}; --force fetches it again"
        raise UsageError(said, code="hub.other-file-here", path=target)
    return found


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; read in chunks."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_STEP))
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
            if progress is not None:
                progress(got)
    return digest.hexdigest()


def _noted(note: Path) -> str | None:
    """The hash that an earlier fetch wrote down."""
    try:
        found = _SHA256.match(note.read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return found.group() if found else None


def _hub() -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import file_download  # noqa: F401  (an attribute of the package from here on)
    except ImportError as error:
        said = f"fetching needs huggingface_hub, pip install 'aprlab[hub]': {error}"
        raise UsageError(said, code="hub.not-installed") from None
    return huggingface_hub


def _offer(known: KnownModel, endpoint: str | None) -> _Offer:
    hub = _hub()
    with _plainly(known):
        url = hub.hf_hub_url(known.repository, known.file, endpoint=endpoint)
        seen = hub.get_hf_file_metadata(url)
    etag = str(seen.etag or "").lower()
    if not _SHA256.fullmatch(etag) or not seen.size:
        said = f"the hub gives no SHA-256 for {known.file} (its ETag is {etag or 'missing'!r})"
        raise FetchError(said, code="hub.hash-missing")
    place = seen.location or url
    return _Offer(etag, seen.size, place, urlsplit(place)[:2] == urlsplit(url)[:2])


def _download(known: KnownModel, offer: _Offer, file: BinaryIO, part: Path) -> int:
    """Fill `part` up to the size announced; the bytes that were there before."""
    hub = _hub()
    there = file.seek(0, os.SEEK_END)
    if there > offer.size:
        there = 0
        file.truncate(file.seek(0))
    room = shutil.disk_usage(part.parent).free
    if offer.size - there > room:
        said = f"{offer.size - there} bytes are missing, and the disk has room for {room}"
        raise UsageError(said, code="hub.no-room", path=part.parent)
    with _plainly(known, part, offer), hub.utils.tqdm(
        desc=known.file[-40:], total=offer.size, initial=there, unit="B", unit_scale=True, disable=None
    ) as bar:  # fmt: skip
        tries = _TRIES
        while (size := file.seek(0, os.SEEK_END)) < offer.size and tries:
            try:
                _receive(hub, offer, file, bar)
                break  # all that the hub wanted to send
            except Exception as error:
                if isinstance(error, AprlabError) or _status(error) is not None or _no_room(error):
                    raise
                tries = _TRIES if file.seek(0, os.SEEK_END) > size else tries - 1
                if not tries:
                    raise
                time.sleep(1)
    size = file.seek(0, os.SEEK_END)
    if size < offer.size:
        said = f"{size} of {offer.size} bytes have arrived; the next try goes on there"
        raise FetchError(said, code="hub.incomplete", path=part)
    return there


def _receive(hub: Any, offer: _Offer, file: BinaryIO, bar: Any) -> None:
    """Append what the hub sends, undecoded and never beyond the size announced; ends where the hub ends."""
    there = file.seek(0, os.SEEK_END)
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    if not offer.same_host:
        headers.pop("authorization", None)  # a token is for the hub, not for where it sends us
    if there:
        headers["Range"] = f"bytes={there}-"
    with _opened(hub, offer.url, headers) as (response, chunks):
        hub.utils.hf_raise_for_status(response)
        packed = response.headers.get("Content-Encoding", "identity")
        if packed != "identity":  # a few kB could unpack to gigabytes
            said = f"the hub sends the file packed ({packed}), which was not asked for; {there} bytes are kept"
            raise FetchError(said, code="hub.content-encoding")
        if there and response.status_code == 200:  # it does not resume
            bar.update(-there)
            there = file.truncate(file.seek(0))
        for chunk in chunks:
            if there + len(chunk) > offer.size:
                file.truncate(0)
                said = f"the hub sends more than the {offer.size} bytes that it announced; it was cut off, nothing is kept"
                raise FetchError(said, code="hub.too-long")
            _write_all(file, chunk)
            there += len(chunk)
            bar.update(len(chunk))


@contextmanager
def _opened(hub: Any, url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """A response and its body as sent, in chunks; with the HTTP client that this version of the library has."""
    session = hub.utils.get_session()
    if hasattr(session, "stream"):  # httpx, from 1.0 on
        with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=_PATIENCE) as response:
            yield response, response.iter_raw(_CHUNK)
    else:  # requests
        with session.get(url, headers=headers, stream=True, timeout=_PATIENCE) as response:
            yield response, response.raw.stream(_CHUNK, decode_content=False)


def _status(error: BaseException) -> int | None:
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _no_room(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write a buffer to an unbuffered file, which may take it in parts."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextmanager
def _plainly(known: KnownModel, part: Path | None = None, offer: _Offer | None = None) -> Iterator[None]:
    """What the library, its HTTP client or the socket raises, as one line."""
    try:
        yield
    except (AprlabError, KeyboardInterrupt):
        raise
    except Exception as error:  # the HTTP client's own errors differ from version to version of the library
        if isinstance(error, OSError) and _no_room(error) and part is not None:
            raise UsageError(f"cannot be written: {error.strerror}", code="hub.unwritable", path=part) from None
        status = _status(error)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if status == 404:
            raise FetchError(f"the hub has no {known.repository}/{known.file}", code="hub.not-found") from None
        if status in (401, 403):
            said = f"the hub requires a login for {known.repository} (HTTP {status}); see `hf auth login`"
            raise FetchError(said, code="hub.login") from None
        code = "hub.unreachable"
        if status is not None:
            what, code = f"the hub answers HTTP {status}", "hub.http-status"
        elif "Offline" in type(error).__name__:
            what, code = "the hub is switched off by HF_HUB_OFFLINE", "hub.switched-off"
        else:
            what = f"the hub cannot be reached ({type(error).__name__}: {reason})"
        if part is not None and offer is not None and part.exists() and (size := part.stat().st_size):
            what += f"; {size} of {offer.size} bytes are kept, the next try goes on there"
        raise FetchError(what, code=code) from None


@contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """The part file, open for reading and writing, by one process at a time."""
    try:
        handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", code="hub.unwritable", path=part) from None
    with os.fdopen(handle, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError("another process is fetching this file", code="hub.busy", path=part) from None
        yield file


__all__ = ["FetchError", "Fetched", "fetch", "sha256"]
