"""YAML files that people write: plain data, and the line where each part of it stands.

An error in such a file is of use only with its line, so `load` returns a way to ask for it beside the data. Tags are
refused (`yaml.SafeLoader`), and so are two keys of one name in one mapping, of which YAML would silently keep the last.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from aprlab.errors import FormatError, UsageError

Key = str | int
LineOf = Callable[..., int]


def load(path: str | Path) -> tuple[Any, LineOf]:
    """The data of a YAML file, and ``line_of(*keys)``: the line, from 1, of what stands under these keys.

    A key is a mapping's key or a list's index: ``line_of("scenarios", 3, "prompt")``. Of a mapping's entry the line is
    its key's; of a list's, where the item begins; without keys, where the document begins. Keys that the file does not
    have give the line of the innermost part that it has, so that a missing key is reported where it is missed.

    Raises:
        UsageError: the file cannot be read.
        FormatError: it is not UTF-8, not YAML, holds a tag or two equal keys, or no document at all; with the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", path=path) from None
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8: {error.reason}", path=path, offset=error.start) from None
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise FormatError("line 1: the file holds nothing", path=path)
        lines: dict[tuple[Key, ...], int] = {}
        _note(node, (), node.start_mark.line + 1, lines, path, set())
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise FormatError(f"{where}{error.problem or error.context}", path=path) from None
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise FormatError(" ".join(str(error).split()), path=path) from None
    except (ValueError, RecursionError) as error:  # a date that there is not, a number or a nest beyond Python's bounds
        raise FormatError(f"{error}", path=path) from None
    finally:
        if loader is not None:
            loader.dispose()

    def line_of(*keys: Key) -> int:
        while keys not in lines:
            keys = keys[:-1]
        return lines[keys]

    return data, line_of


def _note(
    node: yaml.Node, at: tuple[Key, ...], line: int, lines: dict[tuple[Key, ...], int], path: Path, above: set[int]
) -> None:
    """Enter the line of this part and of all below it; refuse equal keys, and parts that hold themselves."""
    lines[at] = line
    if id(node) in above:
        raise FormatError(f"line {line}: an alias to what it stands in", path=path)
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for n, item in enumerate(node.value):
            _note(item, (*at, n), item.start_mark.line + 1, lines, path, above)
    if isinstance(node, yaml.MappingNode):
        seen: dict[Hashable, int] = {}
        for key, value in node.value:
            here = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise FormatError(f"line {here}: a key must be a plain word or number", path=path)
            name: Key = int(key.value) if key.tag.endswith(":int") and key.value.isdecimal() else key.value
            if name in seen:
                raise FormatError(f"line {here}: key {key.value!r} again; it stands at line {seen[name]} already", path=path)
            seen[name] = here
            _note(value, (*at, name), here, lines, path, above)
