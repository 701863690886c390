"""Known models from the Hugging Face hub: resumed, checked by SHA-256, and never a bad file in the place of a good one.

`huggingface_hub` speaks to the hub (addresses, tokens, redirects, retries); what has arrived is kept here in a ``.part`` file
until it is whole and its hash is right, so that an interrupted download goes on where it stopped.
"""

from __future__ import annotations

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

from aprlab import paths
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.published import KnownModel, known_model

_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEP = 1 << 22


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
    """What the hub says of a file: its SHA-256 and size, and where to get it."""

    sha256: str
    size: int
    url: str


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
        due = known.sha256 or _noted(note)
        if due is None and offline:
            raise UsageError("is here, but without network nobody knows its SHA-256", path=target)
        if due is None:
            due = _offer(known, endpoint).sha256
        found = sha256(target, progress)
        if found == due:
            return Fetched(target, target.stat().st_size, found, False, 0, time.perf_counter() - started)
        raise UsageError(f"is here, but its SHA-256 is {found}, not {due}; --force fetches it again", path=target)
    if offline:
        raise UsageError(f"is not here; without --offline it would be fetched from {known.repository}", path=target)
    offer = _offer(known, endpoint)
    for what, ours, theirs in (("SHA-256", known.sha256, offer.sha256), ("size", known.bytes, offer.size)):
        if ours is not None and ours != theirs:
            raise FormatError(f"the hub offers {known.file} of {what} {theirs}, the known one has {ours}; nothing was fetched")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{known.file}.{offer.sha256[:12]}.part"
    with _alone(part) as file:
        resumed = _download(known, offer, file, part)
        found = sha256(part, progress)
        if found != offer.sha256:
            part.unlink()
            raise FormatError(f"came with SHA-256 {found}, {offer.sha256} was due; nothing was kept", path=target)
        os.fsync(file.fileno())
        os.replace(part, target)
    if known.sha256 is None:
        note.write_text(f"{found}  {known.file}\n")  # as sha256sum has it
    return Fetched(target, offer.size, found, True, resumed, time.perf_counter() - started)


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
        raise UsageError(f"fetching needs huggingface_hub, pip install 'aprlab[hub]': {error}") from None
    return huggingface_hub


def _offer(known: KnownModel, endpoint: str | None) -> _Offer:
    hub = _hub()
    with _plainly(known):
        url = hub.hf_hub_url(known.repository, known.file, endpoint=endpoint)
        seen = hub.get_hf_file_metadata(url)
    etag = str(seen.etag or "").lower()
    if not _SHA256.fullmatch(etag) or not seen.size:
        raise FetchError(f"the hub tells no SHA-256 of {known.file} (its ETag is {etag or 'missing'!r})")
    return _Offer(etag, seen.size, seen.location or url)


def _download(known: KnownModel, offer: _Offer, file: BinaryIO, part: Path) -> int:
    """Fill `part` up to the size announced; the bytes that were there before."""
    hub = _hub()
    there = file.seek(0, os.SEEK_END)
    if there > offer.size:
        there = 0
        file.truncate(file.seek(0))
    room = shutil.disk_usage(part.parent).free
    if offer.size - there > room:
        raise UsageError(f"{offer.size - there} bytes are to come, and the disk has room for {room}", path=part.parent)
    with _plainly(known, part, offer):
        hub.file_download.http_get(
            offer.url, file, resume_size=there, headers=hub.utils.build_hf_headers(), expected_size=offer.size
        )
    file.flush()
    size = part.stat().st_size
    if size < offer.size:
        raise FetchError(f"{size} of {offer.size} bytes have arrived; the next try goes on there", path=part)
    return there


@contextmanager
def _plainly(known: KnownModel, part: Path | None = None, offer: _Offer | None = None) -> Iterator[None]:
    """What the library, its HTTP client or the socket raises, as one line."""
    try:
        yield
    except (AprlabError, KeyboardInterrupt):
        raise
    except Exception as error:  # the HTTP client's own errors differ from version to version of the library
        if isinstance(error, OSError) and error.errno in (28, 122) and part is not None:
            raise UsageError(f"cannot be written: {error.strerror}", path=part) from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if status == 404:
            raise FetchError(f"the hub has no {known.repository}/{known.file}") from None
        if status in (401, 403):
            raise FetchError(f"the hub wants a login for {known.repository} (HTTP {status}); see `hf auth login`") from None
        if status is not None:
            what = f"the hub answers HTTP {status}"
        elif "Offline" in type(error).__name__:
            what = "the hub is switched off by HF_HUB_OFFLINE"
        else:
            what = f"the hub cannot be reached ({type(error).__name__}: {reason})"
        if part is not None and offer is not None and part.exists() and (size := part.stat().st_size):
            what += f"; {size} of {offer.size} bytes are kept, the next try goes on there"
        raise FetchError(what) from None


@contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """The part file, open for reading and writing, by one process at a time."""
    try:
        handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", path=part) from None
    with os.fdopen(handle, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError("another process is fetching this file", path=part) from None
        yield file


__all__ = ["FetchError", "Fetched", "fetch", "sha256"]
