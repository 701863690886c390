"""The server part of the tab: what it answers of one file and of two."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from aprlab import paths
from aprlab.faults import convert_with
from aprlab.widgets.file_server import block_page, header_page, opened, tensor_page

NAME = "blk.0.attn_q.weight"


def test_two_files_of_one_name_stay_two(tmp_path: Path) -> None:
    here, there = (tmp_path / folder / "model.apr" for folder in ("a", "b"))
    for path in (here, there):
        path.parent.mkdir()
    convert_with(paths.embedded_model(), here, [])
    convert_with(paths.embedded_model(), there, ["q4k-min-lost"])
    rows = header_page(here, there)["rows"]
    assert next(row for row in rows if row["name"] == NAME)["status"] == "bytes"
    page = tensor_page(here, NAME, there)["detail"]
    assert str(here) in page and str(there) in page


def test_a_file_that_has_changed_is_opened_again(tmp_path: Path) -> None:
    shutil.copy(paths.embedded_model(), path := tmp_path / "m.gguf")
    first, again = opened(path)[0], opened(path)[0]
    assert first is again
    path.write_bytes(path.read_bytes() + bytes(32))
    assert opened(path)[0] is not first


@pytest.mark.parametrize(("row", "block", "at"), [(0, 0, (0, 0)), (10**9, 7, (255, 0))])
def test_a_block_beyond_the_end_is_the_last_one(row: int, block: int, at: tuple[int, int]) -> None:
    seen = block_page(paths.embedded_model(), NAME, row, block)
    assert (seen["row"], seen["block"]) == at
