"""Ollama's Modelfile: what it says, and what is wrong with a broken one, by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprlab.errors import FormatError
from aprlab.formats.modelfile import MOST, read_modelfile

WHOLE = '''# a comment
from ./m.gguf
TEMPLATE """{{ .Prompt }}
# no comment
"""
SYSTEM "You are x."
PARAMETER stop "<|im_end|>"
PARAMETER stop """
###"""
parameter num_ctx 4096
MESSAGE user hi
MESSAGE assistant """two
lines"""
LICENSE """FROM nothing"""
ADAPTER ./lora.gguf
'''


def test_every_instruction_is_read(tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text(WHOLE)
    found = read_modelfile(tmp_path / "Modelfile")
    assert (found.base, found.system) == ("./m.gguf", "You are x.")
    assert found.template == "{{ .Prompt }}\n# no comment\n"
    assert found.stops == ["<|im_end|>", "\n###"]
    assert found.parameters == {"num_ctx": ["4096"]}
    assert found.messages == [("user", "hi"), ("assistant", "two\nlines")] and found.other == ["ADAPTER ./lora.gguf"]


@pytest.mark.parametrize(("text", "code"), [
    ("TEMPLATE x\n", "modelfile.no-from"), ("FROM x\nTEMPLATE \"\"\"never\n", "modelfile.open-quote"),
    ("FROM x\nSYSTEM \"never\n", "modelfile.open-quote"), ("FROM x\nPARAMETER stop\n", "modelfile.value"),
    ("FROM x\nRUN rm\n", "modelfile.instruction"), ("", "modelfile.no-from"), ("\x00", "modelfile.instruction"),
])  # fmt: skip
def test_a_broken_one_is_refused_in_one_line(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "Modelfile").write_text(text)
    with pytest.raises(FormatError) as found:
        read_modelfile(tmp_path / "Modelfile")
    assert found.value.code == code and "\n" not in found.value.message


def test_what_is_no_text_of_a_fair_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"GGUF\xff\xfe")
    (tmp_path / "long").write_text("FROM x\n" + "#" * MOST)
    for name in ("binary", "long", "absent", "."):
        with pytest.raises(FormatError):
            read_modelfile(tmp_path / name)
