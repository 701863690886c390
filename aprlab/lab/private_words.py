"""What a report that is handed over must not tell: where files lie, whose machine it is.

A case is made so that nothing of that kind gets into it: its files are called by their names alone. This is the second
lock: text on its way out is searched for what is known of this machine, and for anything that looks like a place in a file
system.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_PLACES = r"home|Users|root|tmp|var|private|mnt|media|srv|opt|usr|work|workspace|content|data|scratch|nfs|lustre"
_BELOW = r"(?:[^\s\"'<>|:*?/\\]+/)*"  # folders of folders
_FOLDER = re.compile(rf"(?<![\w.:/<~])/(?:{_PLACES})/{_BELOW}")
_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:\\{1,2}(?:[^\s\"'<>|:*?/\\]+\\{1,2})*")
_ADDRESS = re.compile(r"(?<=://)(?:[^\s\"'<>/@]+@)?(?:localhost|\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-fA-F:]+\])(?::\d+)?")
# a machine of a private network in a URL or before a path: a name without a dot, or under a top level that no registry gives out
_LOCAL = r"[\w-]+(?:\.[\w-]+)*\.(?:local|lan|internal|intranet|intra|corp|private|home|localdomain|test)|[A-Za-z0-9][\w-]*"
_MACHINE = re.compile(rf"(?<=://)(?:[^\s\"'<>/@]+@)?(?:{_LOCAL})(?=[:/\s\"'<>]|$)(?::\d+)?")
_LOGIN = re.compile(r"(?<![\w.])[A-Za-z_][\w.-]*@[A-Za-z0-9][\w.-]*(?=:[/~])")  # as scp has it
_SHARE = re.compile(r"(?<![\w\\])\\{2,4}[\w.-]+(?:\\{1,2}[^\s\"'<>|:*?/\\]+)*\\{1,2}")  # \\server\share\
_LEAST = 4  # letters of a name of a machine or a user that is searched for; shorter ones are words
_NOBODY = ("root", "user", "admin", "jovyan", "runner", "ubuntu", "nobody", "localhost")  # names that tell of nobody


class PrivateWords:
    """Takes private words out of text.

    Args:
        folders: of the files at hand; each is removed where it is in front of a name.
        addresses: that were asked; their hosts are removed wherever they are named.
    """

    def __init__(self, folders: Iterable[Path] = (), addresses: Iterable[str] = ()) -> None:
        known = [*folders, Path.cwd(), Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix)]
        absolute = {str(form) for place in known for form in (place.absolute(), place.resolve())}
        longest_first = sorted((re.escape(place.rstrip("/")) for place in absolute if place != "/"), key=len, reverse=True)
        self._folders = re.compile(rf"(?:{'|'.join(longest_first)})/{_BELOW}")
        asked = {urlsplit(address).hostname or "" for address in addresses if "://" in address}
        machines = {socket.gethostname(), socket.getfqdn(), os.environ.get("HOSTNAME", ""), *asked}
        self._names = {name: "HOST" for name in machines if _tells(name)} | {name: "USER" for name in _users() if _tells(name)}

    def without(self, text: str) -> str:
        """`text` with names of files where there were paths, ``HOST`` where a machine was named, and ``USER`` for its user."""
        text = _LOGIN.sub("USER@HOST", _SHARE.sub("", _WINDOWS.sub("", text)))
        text = _FOLDER.sub("", self._folders.sub("", text))
        text = _MACHINE.sub("HOST", _ADDRESS.sub("HOST", text))
        for name in sorted(self._names, key=len, reverse=True):
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", self._names[name], text)
        return text

    def within(self, value: Any) -> Any:
        """The same for plain data: all its texts, keys included."""
        if isinstance(value, str):
            return self.without(value)
        if isinstance(value, Mapping):
            return {self.without(key): self.within(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.within(item) for item in value]
        return value

    def of_outputs(self, outputs: Iterable[dict[str, Any]]) -> None:
        """The same for the outputs of a notebook's cell, in place; pictures are not text."""
        for output in outputs:
            for key in ("text", "traceback", "evalue"):
                if key in output:
                    output[key] = self.within(output[key])
            data = output.get("data", {})
            for kind in list(data):
                if not kind.startswith("image/") or kind == "image/svg+xml":
                    data[kind] = self.within(data[kind])


def _tells(name: str) -> bool:
    """Whether a name tells of anybody, and is too odd to be a word."""
    return len(name) >= _LEAST and name.lower() not in _NOBODY


def _users() -> set[str]:
    """Who this is, as far as the system says."""
    try:
        known = {getpass.getuser()}
    except (OSError, KeyError, ImportError):  # a number without a name, in a container
        known = set()
    return known | {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}


__all__ = ["PrivateWords"]
