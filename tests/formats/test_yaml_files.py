"""YAML with lines: what is refused, and where it is said to stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprlab.errors import FormatError, UsageError
from aprlab.formats import yaml_files as yamlfile

TEXT = """\
# two scenarios
name: quick
scenarios:
  - id: add
    prompt: What is 2+2?

  - id: write
    tags: [a, b,
           c]
5: five
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "file.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_data_and_lines(tmp_path: Path) -> None:
    data, line_of = yamlfile.load(write(tmp_path, TEXT))
    assert data["scenarios"][1] == {"id": "write", "tags": ["a", "b", "c"]}
    keys = {
        (): 2, ("name",): 2, ("scenarios",): 3, ("scenarios", 0): 4, ("scenarios", 0, "prompt"): 5, ("scenarios", 1): 7,
        ("scenarios", 1, "tags", 1): 8, ("scenarios", 1, "tags", 2): 9, (5,): 10,
    }  # fmt: skip
    for at, line in keys.items():
        assert line_of(*at) == line, at


def test_a_missing_key_has_the_line_of_what_lacks_it(tmp_path: Path) -> None:
    _, line_of = yamlfile.load(write(tmp_path, TEXT))
    assert line_of("scenarios", 1, "prompt") == 7
    assert line_of("scenarios", 9, "prompt") == 3
    assert line_of("nothing") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"line 3, column 2: .*expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' again; it is at line 1 already"),
        ("a:\n  - x: 1\n    x: 2\n", "line 3: key 'x' again"),
        ("a: !!python/object/apply:os.system [ls]\n", r"line 1, column 4: could not determine a constructor"),
        ("? [1, 2]\n: 3\n", "line 1: a key must be"),
        ("# nothing but a comment\n", "line 1: the file holds nothing"),
        ("", "line 1: the file holds nothing"),
        ("a: 1\n---\nb: 2\n", r"line 2, column 1: but found another document"),
        ("a: &x\n  b: *x\n", "line 2: an alias to the part that contains it"),
        ("a: *nobody\n", "line 1, column 4: found undefined alias"),
        ("a: \x01\n", "special characters are not allowed"),
        (b"a: \xff\n", "not UTF-8"),
        ("a: 2026-13-45\n", "month must be in"),
        ("a: " + "9" * 5000 + "\n", "a number of 5000 characters"),
        ("[" * 700, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        yamlfile.load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        yamlfile.load(tmp_path / "none.yaml")
