"""What a report that is handed over must not tell: where files lie, whose machine it is.

A case is made so that nothing of that kind gets into it: its files are called by their names alone. This is the second
lock: text on its way out is searched for what is known of this machine, and for anything that looks like a place in a file
system.
"""

from __future__ import annotations

import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_PLACES = r"home|Users|root|tmp|var|private|mnt|media|srv|opt|usr|work|workspace|content|data|scratch|nfs|lustre"
_BELOW = r"(?:[^\s\"'<>|:*?/\\]+/)*"  # folders of folders
_FOLDER = re.compile(rf"(?<![\w.:/<~])/(?:{_PLACES})/{_BELOW}")
_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:\\{1,2}(?:[^\s\"'<>|:*?/\\]+\\{1,2})*")
_ADDRESS = re.compile(r"(?<=://)(?:[^\s\"'<>/@]+@)?(?:localhost|\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-fA-F:]+\])(?::\d+)?")
_LEAST = 4  # letters of a name of a machine that is searched for; shorter ones are words


class PrivateWords:
    """Takes private words out of text.

    Args:
        folders: of the files at hand; each is removed where it is in front of a name.
    """

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        known = [*folders, Path.cwd(), Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix)]
        absolute = {str(form) for place in known for form in (place.absolute(), place.resolve())}
        longest_first = sorted((re.escape(place.rstrip("/")) for place in absolute if place != "/"), key=len, reverse=True)
        self._folders = re.compile(rf"(?:{'|'.join(longest_first)})/{_BELOW}")
        self._names = [name for name in {socket.gethostname(), socket.getfqdn()} if len(name) >= _LEAST and name != "localhost"]

    def without(self, text: str) -> str:
        """`text` with names of files where there were paths, and ``HOST`` where the machine was named."""
        text = _FOLDER.sub("", self._folders.sub("", text))
        text = _ADDRESS.sub("HOST", _WINDOWS.sub("", text))
        for name in self._names:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "HOST", text)
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


__all__ = ["PrivateWords"]
