"""What JupyterLab's tab of a model file asks the server for: the header, one tensor, one block, a notebook.

A Jupyter server extension. Files are mapped, so that a header or a tensor is read and never the whole file; paths are
those of the server's contents manager, which keeps them below its root; every answer asks for the server's token.
The pages are those of the explorers (`aprlab.widgets.pages`), with every name escaped. What makes them is imported with
the first file: a server that opens none starts no slower.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.ioloop import IOLoop

from aprlab.errors import AprlabError, UsageError

if TYPE_CHECKING:
    from aprlab.widgets.models.files import Side

SUFFIXES = (".gguf", ".apr", ".safetensors")


@lru_cache(maxsize=4)
def _opened(path: Path, label: str, stamp: tuple[int, int]) -> Side:
    from aprlab.widgets.models.files import Side

    return Side.open(path, label)


def opened(*files: Path | None) -> list[Side]:
    """The files that there are, from the last few that were opened unless they have changed since."""
    from aprlab.widgets.models.files import labels_of

    paths = [path for path in files if path is not None]
    stamps = [(status.st_mtime_ns, status.st_size) for status in (path.stat() for path in paths)]
    return [_opened(*each) for each in zip(paths, labels_of(paths), stamps, strict=True)]


def header_page(path: Path, other: Path | None = None) -> dict[str, Any]:
    """Title, config, inventory by type and the rows of the tensor table; two files are compared byte by byte."""
    from aprlab.widgets import pages
    from aprlab.widgets.models.tensors import TensorBrowser

    sides = opened(path, other)
    browser = TensorBrowser(*sides)
    browser.work.wait()
    if browser.work.error:
        raise UsageError(browser.work.error, code="widgets.comparison-failed")
    return {
        "title": " and ".join(side.label for side in sides),
        "compared": len(sides) == 2,
        "style": Path(pages.__file__).with_name("clickable.css").read_text(encoding="utf-8"),
        "head": pages.file_head(sides[0]) + pages.tensor_head(browser),
        "rows": [
            {"name": row.name, "status": row.status, "type": row.type, "other": row.other,
             "shape": " × ".join(map(str, row.shape)), "bytes": row.nbytes}
            for row in browser.rows
        ],
    }  # fmt: skip


def tensor_page(path: Path, name: str, other: Path | None = None) -> dict[str, Any]:
    """Fingerprint, histogram and first block of one tensor, on one side or both."""
    from aprlab.widgets import pages
    from aprlab.widgets.drawing import png, value_histogram
    from aprlab.widgets.models.tensors import TensorBrowser

    browser = TensorBrowser(*opened(path, other), compare=False)
    browser.look(name)
    seen = browser.detail
    picture = png(lambda ax: value_histogram(seen.values, ax), (3.9, 2.8)) if seen is not None and seen.values else b""
    return {"detail": pages.tensor_detail(browser), "histogram": base64.b64encode(picture).decode()}


def block_page(path: Path, name: str, row: int = 0, block: int = 0) -> dict[str, Any]:
    """One block: its bytes by field, the numbers in the fields, its values."""
    from aprlab.widgets import pages
    from aprlab.widgets.models.blocks import BlockMicroscope

    scope = BlockMicroscope(*opened(path), name=name)
    scope.choose(row=row, block=block)
    return {
        "row": scope.row, "rows": scope.tensor().rows, "block": scope.block, "blocks": scope.blocks,
        "page": pages.block_bytes(scope.first) + pages.block_fields(scope.first) + pages.block_values(scope),
    }  # fmt: skip


def write_notebook(kind: str, folder: Path, reference: str = "", candidate: str = "") -> Path:
    """A notebook in `folder` with its parameters filled in; never over one that is there.

    Args:
        kind: ``two`` files, ``one`` file, or ``garbage``, a sentence.
        reference, candidate: paths as seen from `folder`.
    """
    from aprlab.lab.fresh_notebooks import fresh

    notebook, stem = fresh(kind, reference=reference, candidate=candidate)
    for n in range(1, 1000):
        path = folder / (f"{stem}.ipynb" if n == 1 else f"{stem}-{n}.ipynb")
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(notebook)
            return path
        except FileExistsError:
            continue
    raise UsageError(f"{folder}: a thousand notebooks {stem} are there already", code="widgets.too-many-notebooks")


class Handler(APIHandler):
    """Answers JSON; a file that cannot be read is status 400 and one line."""

    def file(self, argument: str) -> Path | None:
        """The file that an argument names, below the server's root; None where it is empty."""
        given = self.get_argument(argument, "")
        if not given:
            return None
        path = Path(self.place(given))
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise web.HTTPError(404, f"no model file {given!r}")
        return path

    def place(self, given: str) -> str:
        """A path of the contents manager as one of this machine; refuses what is hidden or outside the root."""
        manager = self.contents_manager
        if not hasattr(manager, "_get_os_path"):
            raise web.HTTPError(501, "model files are opened only where the server keeps its files on a disk")
        path: str = manager._get_os_path(given)  # raises 404 outside the root
        if not manager.allow_hidden and any(part.startswith(".") for part in Path(given).parts):
            raise web.HTTPError(404, f"no model file {given!r}")
        return path

    async def answer(self, work: Callable[[], Any]) -> None:
        """Work in a thread, so that a large file does not hold up the kernels' messages."""
        try:
            found = await IOLoop.current().run_in_executor(None, work)
        except AprlabError as error:
            raise web.HTTPError(400, str(error)) from None
        except OSError as error:
            raise web.HTTPError(400, f"cannot be read: {error.strerror}") from None
        self.finish(json.dumps(found))

    def needed(self, argument: str = "path") -> Path:
        path = self.file(argument)
        if path is None:
            raise web.HTTPError(400, f"argument {argument!r} is missing")
        return path

    def number(self, argument: str) -> int:
        try:
            return int(self.get_argument(argument, "0"))
        except ValueError:
            raise web.HTTPError(400, f"argument {argument!r} is no whole number") from None


class HeaderHandler(Handler):
    @web.authenticated
    @authorized(action="read", resource="contents")
    async def get(self) -> None:
        path, other = self.needed(), self.file("other")
        await self.answer(lambda: header_page(path, other))


class TensorHandler(Handler):
    @web.authenticated
    @authorized(action="read", resource="contents")
    async def get(self) -> None:
        path, name, other = self.needed(), self.get_argument("name"), self.file("other")
        await self.answer(lambda: tensor_page(path, name, other))


class BlockHandler(Handler):
    @web.authenticated
    @authorized(action="read", resource="contents")
    async def get(self) -> None:
        path, name = self.needed(), self.get_argument("name")
        row, block = self.number("row"), self.number("block")
        await self.answer(lambda: block_page(path, name, row, block))


class NotebookHandler(Handler):
    @web.authenticated
    @authorized(action="write", resource="contents")
    async def post(self) -> None:
        given = self.get_json_body() or {}
        kind, paths = str(given.get("kind", "one")), [str(given.get(key) or "") for key in ("reference", "candidate")]
        folder = Path(self.place(str(given.get("folder") or "")))
        if not folder.is_dir():
            raise web.HTTPError(404, "no such folder")
        seen = [os.path.relpath(self.place(path), folder) if path else "" for path in paths]
        root = Path(self.place(""))
        await self.answer(lambda: {"path": write_notebook(kind, folder, *seen).relative_to(root).as_posix()})


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "aprlab.widgets.file_server"}]


def _load_jupyter_server_extension(server: Any) -> None:
    routes = {"file": HeaderHandler, "tensor": TensorHandler, "block": BlockHandler, "notebook": NotebookHandler}
    base = server.web_app.settings["base_url"]
    server.web_app.add_handlers(".*$", [(url_path_join(base, "aprlab", name), handler) for name, handler in routes.items()])


__all__ = ["SUFFIXES", "block_page", "header_page", "opened", "tensor_page", "write_notebook"]
