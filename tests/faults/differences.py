"""Two APR files side by side, entry by entry, nothing interpreted: what a file fault has changed, and all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aprlab.faults.naming import gguf_name
from aprlab.formats import apr
from aprlab.formats.apr import Container, Entry
from aprlab.model import names


def box(path: Path) -> Container:
    return apr.scan(path)


def by_gguf(box: Container) -> dict[str, list[Entry]]:
    """Entries by the GGUF name they stand for (their own where nobody knows it)."""
    found: dict[str, list[Entry]] = {}
    for entry in box.entries:
        found.setdefault(gguf_name(entry.name), []).append(entry)
    return found


def differences(healthy: Container, broken: Container) -> dict[str, set[str]]:
    """Kind of difference -> templates of GGUF names (or metadata keys) that have it; kinds without any are left out.

    Kinds: missing, extra, twice, renamed, code, dims, size, bytes (where sizes agree), offset and order (where names and
    sizes all agree), metadata, flags, problems (of the container, by the first word that tells).
    """
    a, b = by_gguf(healthy), by_gguf(broken)
    seen: dict[str, set[str]] = {
        "missing": {names.template_of(n) for n in a if n not in b},
        "extra": {names.template_of(n) for n in b if n not in a},
        "twice": {names.template_of(n) for n, entries in b.items() if len(entries) > 1},
    }
    for kind in ("renamed", "code", "dims", "size", "bytes", "offset"):
        seen[kind] = set()
    same_sizes = not (seen["missing"] or seen["extra"] or seen["twice"])
    for name in a:
        if name not in b:
            continue
        x, y, template = a[name][0], b[name][0], names.template_of(name)
        for kind, differ in (("renamed", x.name != y.name), ("code", x.code != y.code), ("dims", x.dims != y.dims)):
            if differ:
                seen[kind].add(template)
        if x.size != y.size:
            seen["size"].add(template)
            same_sizes = False
        elif not np.array_equal(healthy.bytes_of(x), broken.bytes_of(y)):
            seen["bytes"].add(template)
    order_a, order_b = [gguf_name(e.name) for e in healthy.entries], [gguf_name(e.name) for e in broken.entries]
    if same_sizes and order_a == order_b:
        seen["offset"] = {names.template_of(n) for n in a if a[n][0].offset != b[n][0].offset}
    elif same_sizes and not seen["renamed"]:
        seen["order"] = {"index"}
    keys = {*healthy.metadata, *broken.metadata}
    seen["metadata"] = {key for key in keys if healthy.metadata.get(key) != broken.metadata.get(key)}
    seen["flags"] = set(healthy.flag_names) ^ set(broken.flag_names)
    words = ("not sorted", "is listed twice", "ends at", "overlap", "CRC", "footer")
    seen["problems"] = {next((w for w in words if w in str(p)), str(p)) for p in broken.problems}
    return {kind: found for kind, found in seen.items() if found}
