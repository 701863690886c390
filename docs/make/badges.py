"""Write Colab and Binder badges for a public address: `python docs/make/badges.py OWNER/NAME [--branch main] [--folder DIR]`.

The project's files name no address, so they have no badges until somebody gives one. This writes them into the README and into
the first cell of every notebook, and puts a cell behind the parameters that installs aprlab *from that address* where it is not
installed (Colab); it is never asked of a package index, where that name may be anybody's. A second run replaces what the first
wrote. Neither Colab nor Binder can be reached from the tests: they hold what is written, not that it works there.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "install"  # id of the cell
_ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}")
_BRANCH = re.compile(r"[A-Za-z0-9._/-]{1,100}")
_LINE = re.compile(r"^\[!\[(?:Colab|Binder)\].*\n\n?", flags=re.M)


def badges(address: str, branch: str, notebook: str) -> str:
    """The line of badges for one notebook, by its path in the repository."""
    colab = f"https://colab.research.google.com/github/{address}/blob/{branch}/{notebook}"
    binder = f"https://mybinder.org/v2/gh/{address}/{branch}?urlpath=lab/tree/{notebook}"
    return (
        f"[![Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )


def install_cell(address: str, branch: str) -> str:
    """The source of the cell that installs aprlab where it is missing."""
    return f"""\
# Where aprlab is not installed (Colab), it comes from its repository; elsewhere this does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("aprlab") is None:
    address = "aprlab @ git+https://github.com/{address}@{branch}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", address], check=True)"""


def with_badges(text: str, line: str) -> str:
    """Markdown with the line of badges under its first heading; an older line is replaced."""
    head, rest = _LINE.sub("", text).split("\n", 1)
    return f"{head}\n\n{line}\n\n{rest.lstrip(chr(10))}"


def write_notebook(path: Path, name: str, address: str, branch: str) -> None:
    """Badges and the install cell; cells are counted again, outputs stay."""
    notebook = nbformat.read(path, 4)
    notebook.cells[0].source = with_badges(notebook.cells[0].source, badges(address, branch, name))
    notebook.cells = [cell for cell in notebook.cells if cell.get("id") != INSTALL]
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    cell = nbformat.v4.new_code_cell(install_cell(address, branch), metadata={"jupyter": {"source_hidden": True}})
    cell["id"] = INSTALL
    notebook.cells.insert(place + 1, cell)
    if any(cell.get("execution_count") for cell in notebook.cells):
        for count, each in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
            each.execution_count = count
            for output in each.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    nbformat.write(notebook, path)


def main(words: list[str]) -> int:
    """Write everything, or nothing where the address is none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("address", help="OWNER/NAME of the repository on GitHub")
    parser.add_argument("--branch", default="main")
    parser.add_argument("--folder", type=Path, default=ROOT, help="the checkout")
    given = parser.parse_args(words)
    if not _ADDRESS.fullmatch(given.address) or not _BRANCH.fullmatch(given.branch):
        print(f"{given.address!r} on {given.branch!r} is no OWNER/NAME and branch", file=sys.stderr)
        return 2
    notebooks = sorted((given.folder / "notebooks").glob("*.ipynb"))
    if not notebooks:
        print(f"{given.folder} has no notebooks", file=sys.stderr)
        return 2
    for path in notebooks:
        write_notebook(path, f"notebooks/{path.name}", given.address, given.branch)
    readme = given.folder / "README.md"
    front = badges(given.address, given.branch, "notebooks/index.ipynb")
    readme.write_text(with_badges(readme.read_text(encoding="utf-8"), front), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
