"""YAML files that people write: plain data, and the line of each part.

An error in such a file is useful only with its line, so `load` returns a way to ask for it, next to the data. Tags are
refused (`yaml.SafeLoader`), and so are two keys of one name in one mapping, of which YAML would silently keep the last.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from aprlab.errors import FormatError, UsageError
from aprlab.formats.reading import read_bytes

MOST_BYTES = 1 << 20  # of a file; people write a hundredth of it
MOST_PARTS = 20_000  # keys, items and values, each counted as often as aliases repeat it
MOST_CHARACTERS = 64  # of a number

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
Key = str | int
LineOf = Callable[..., int]


def load(path: str | Path) -> tuple[Any, LineOf]:
    """The data of a YAML file, and ``line_of(*keys)``: the line, from 1, of what is under these keys.

    A key is a mapping's key or a list's index: ``line_of("scenarios", 3, "prompt")``. Of a mapping's entry the line is
    its key's; of a list's, where the item begins; without keys, where the document begins. Keys that the file does not
    have give the line of the innermost part that it has, so that a missing key is reported where it is missed.

    Raises:
        UsageError: the file cannot be read, or is not a regular file.
        FormatError: it is not UTF-8, not YAML, holds a tag or two equal keys, no document at all, or more than `MOST_PARTS`
            parts with its aliases written out; with the line.
    """
    path = Path(path)
    try:
        text = read_bytes(path, MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", code="yaml.unreadable", path=path) from None
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8: {error.reason}", code="yaml.not-utf8", path=path, offset=error.start) from None
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise FormatError("line 1: the file holds nothing", code="yaml.empty", path=path)
        lines: dict[tuple[Key, ...], int] = {}
        _note(node, (), node.start_mark.line + 1, lines, path, set())
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise FormatError(f"{where}{error.problem or error.context}", code="yaml.syntax", path=path) from None
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise FormatError(" ".join(str(error).split()), code="yaml.character", path=path) from None
    except RecursionError:
        raise FormatError("nested too deeply", code="yaml.nesting", path=path) from None
    except _UNLIKE as error:
        raise FormatError(f"a value that is not what its tag says: {error}", code="yaml.value", path=path) from None
    finally:
        if loader is not None:
            loader.dispose()

    def line_of(*keys: Key) -> int:
        while keys not in lines:
            keys = keys[:-1]
        return lines[keys]

    return data, line_of


# What PyYAML lets through when a date does not exist, or a tag (`!!bool maybe`, `!!timestamp x`) does not fit its value.
_UNLIKE = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)


def _note(
    node: yaml.Node, at: tuple[Key, ...], line: int, lines: dict[tuple[Key, ...], int], path: Path, above: set[int]
) -> None:
    """Enter the line of this part and of all below it; refuse equal keys, and parts that hold themselves."""
    lines[at] = line
    if len(lines) > MOST_PARTS:
        said = f"line {line}: more than {MOST_PARTS} parts with its aliases written out"
        raise FormatError(said, code="yaml.parts-limit", path=path)
    if id(node) in above:
        raise FormatError(f"line {line}: an alias to the part that contains it", code="yaml.alias-circle", path=path)
    if node.tag in _NUMBERS and len(node.value) > MOST_CHARACTERS:
        raise FormatError(f"line {line}: a number of {len(node.value)} characters", code="yaml.number-length", path=path)
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for n, item in enumerate(node.value):
            _note(item, (*at, n), item.start_mark.line + 1, lines, path, above)
    if isinstance(node, yaml.MappingNode):
        seen: dict[Hashable, int] = {}
        for key, value in node.value:
            here = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise FormatError(f"line {here}: a key must be a plain word or number", code="yaml.key-kind", path=path)
            if key.tag in _NUMBERS and len(key.value) > MOST_CHARACTERS:
                raise FormatError(f"line {here}: a number of {len(key.value)} characters", code="yaml.number-length", path=path)
            name: Key = int(key.value) if key.tag.endswith(":int") and key.value.isdecimal() else key.value
            if name in seen:
                said = f"line {here}: key {key.value!r:.80} again; it is at line {seen[name]} already"
                raise FormatError(said, code="yaml.key-again", path=path)
            seen[name] = here
            _note(value, (*at, name), here, lines, path, above)
