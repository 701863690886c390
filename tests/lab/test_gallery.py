"""The gallery is what the committed notebooks draw, small enough for a repository, and opened from the README."""

from __future__ import annotations

from pathlib import Path

from pages import page_script

from aprlab import paths

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "docs" / "gallery"


def test_the_gallery_is_what_the_notebooks_draw() -> None:
    made = page_script("gallery")
    found = list(made.entries(paths.notebooks_dir()))
    assert (GALLERY / "README.md").read_text() == made.page(found), "run docs/make/gallery.py"
    assert {path.stem for path in GALLERY.glob("*.png")} == {entry.name for entry in found}
    assert len(found) >= 8
    assert sum(path.stat().st_size for path in GALLERY.iterdir()) < 1_500_000
    assert "](docs/gallery/README.md)" in (ROOT / "README.md").read_text()
