"""Files that this process has in use: those it has mapped, and temporary ones that it is writing.

Kept apart and without imports, so that the command line can look here at any moment, even before anything was loaded.
"""

from __future__ import annotations

import os

MAPPED: dict[int, tuple[int, os.PathLike[str]]] = {}  # address -> size and path of each file that is mapped now
PARTS: set[str] = set()  # temporary files and folders that have a name
