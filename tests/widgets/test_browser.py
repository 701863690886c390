"""A real browser opens real JupyterLab: a reference notebook under Run All, and the explorers by mouse.

``pytest tests/widgets/test_browser.py --screenshots docs/screenshots`` also writes the pictures that the docs show.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aprlab import paths
from aprlab.faults import convert_with
from aprlab.formats import open_model
from aprlab.lab import notebooks
from aprlab.lab.jupyter import environment as environment_of_lab
from aprlab.tracing import compare

pytestmark = pytest.mark.browser
SECONDS = 240  # a machine that has other work to do
LIMIT = 250_000  # bytes of a screenshot
LAG = 150  # ms each way between page and kernel: what does not wait for an answer fails here, not once in twenty runs
SLOW_LINK = """
    const send = WebSocket.prototype.send;
    WebSocket.prototype.send = function (data) { setTimeout(() => this.readyState === 1 && send.call(this, data), LAG) };
    const own = Object.getOwnPropertyDescriptor(WebSocket.prototype, "onmessage");
    Object.defineProperty(WebSocket.prototype, "onmessage", {
      ...own, set(heard) { own.set.call(this, heard && ((event) => setTimeout(() => heard.call(this, event), LAG))) },
    });
"""


def chromium() -> str | None:
    """A Chromium that is installed, '' for Playwright's own, None where there is neither."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    own = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache/ms-playwright")
    return "" if own.is_dir() and any(own.glob("chromium*")) else None


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a JupyterLab over a copy of the notebooks; `{}` stands where the notebook's path goes."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(paths.notebooks_dir(), folder / "notebooks")
    quiet = folder / "config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # else a question lies over the notebook
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data"), "TQDM_DISABLE": "1"}
    environment = {key: value for key, value in environment_of_lab().items() if key != "MPLBACKEND"} | settings
    (folder / "models").mkdir()
    shutil.copy(paths.embedded_model(), folder / "models" / "tiny.gguf")
    convert_with(paths.embedded_model(), folder / "models" / "broken.apr", ["GH-191"])
    options = ["--no-browser", "--allow-root", "--ServerApp.token=aprlab", f"--port={port}", "--LabApp.news_url="]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={folder}"]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _until_it_answers(port, server, folder / "lab.log")
        FOLDER.append(folder)
        yield f"http://127.0.0.1:{port}/doc/tree/notebooks/{{}}?token=aprlab&reset"
    finally:
        server.terminate()
        server.wait(30)


def _until_it_answers(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(SECONDS):
        if server.poll() is not None:
            pytest.fail(f"JupyterLab ended: {log.read_text()[-2000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(1)
    pytest.fail("JupyterLab did not start")


FOLDER: list[Path] = []  # of the JupyterLab that runs


@pytest.fixture(scope="module")
def folder_of_lab(lab: str) -> Path:
    """The server's root."""
    return FOLDER[-1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    path = chromium()
    if path is None:
        pytest.skip("there is no chromium here: apt-get install chromium, or playwright install chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path or None, args=["--no-sandbox", "--disable-gpu"])
        yield started.new_context()  # one for all pages: JupyterLab's scripts are fetched and compiled once
        started.close()


def new_page(browser: Any, width: int, height: int) -> Any:
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": height})
    return page


PROMPT = ".jp-CodeCell .jp-InputArea-prompt"
WIDGET = ".jp-OutputArea-output .widget-vbox"


class Page:
    """One notebook in the browser. Complaints of the page itself are collected."""

    def __init__(self, browser: Any, address: str, width: int, height: int) -> None:
        self.timed_out = pytest.importorskip("playwright.sync_api").TimeoutError
        self.page = new_page(browser, width, height)
        self.page.set_default_timeout(1000 * SECONDS)
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.add_init_script(SLOW_LINK.replace("LAG", str(LAG)))
        self.page.goto(address)
        self.page.wait_for_selector(".jp-Notebook-cell")
        self.page.wait_for_selector("text=/\\| Idle/")

    def run_all(self) -> None:
        """The menu's Run All Cells; again where the page was not ready yet and nothing began."""
        begun = f"() => [...document.querySelectorAll('{PROMPT}')].some(e => /\\[(\\d+|\\*)\\]/.test(e.textContent))"
        for _ in range(8):
            self.page.click('.lm-MenuBar-itemLabel:text-is("Run")')
            self.page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
            with suppress(self.timed_out):
                self.page.wait_for_function(begun, timeout=3000)
                return
        pytest.fail("Run All Cells does nothing")

    def wait_for_cells(self) -> None:
        """Until no cell is waiting or running."""
        script = f"() => [...document.querySelectorAll('{PROMPT}')].every(e => /\\[\\d+\\]/.test(e.textContent))"
        self.page.wait_for_function(script)

    def check(self) -> None:
        """No error output, no widget without its model, no complaint of a script."""
        assert (
            self.page.locator("[data-mime-type='application/vnd.jupyter.error'], .jp-OutputArea-output.jp-mod-error").count() == 0
        )
        text = self.page.inner_text("body")
        for bad in ("Traceback (most recent call last)", "model not found", "Error displaying widget", "Error creating widget"):
            assert bad not in text
        assert not [line for line in self.complaints if "ResizeObserver" not in line]

    def says(self, words: str) -> None:
        """Until the widget says it."""
        self.page.wait_for_selector(f"{WIDGET} >> text={words} >> visible=true")

    def in_view(self, selector: str) -> bool:
        """The element lies within the list that it scrolls in."""
        script = """e => { const [inner, outer] = [e, e.closest("[data-scroll]")].map(x => x.getBoundingClientRect());
            return inner.height > 0 && inner.top >= outer.top && inner.bottom <= outer.bottom }"""
        return bool(self.page.locator(selector).evaluate(script))

    def settle(self) -> None:
        """Until no work of a widget is under way (its stop button is the only thing that tells)."""
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('button')].filter(b => b.innerText.trim() == 'stop').every(b => b.disabled)"
        )
        self.page.wait_for_timeout(700)


@pytest.fixture
def opened(browser: Any, lab: str) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []

    def open_(notebook: str, width: int = 1200, height: int = 1000) -> Page:
        pages.append(Page(browser, lab.format(notebook), width, height))
        return pages[-1]

    yield open_
    for page in pages:
        page.page.close()


@pytest.fixture
def shoot(request: pytest.FixtureRequest) -> Callable[[Page, str, str], None]:
    """Look at an element; with --screenshots DIR the picture is kept there, few enough bytes for a repository."""
    folder = request.config.getoption("--screenshots", default=None)

    def take(page: Page, selector: str, name: str) -> None:
        from PIL import Image

        seen = Image.open(io.BytesIO(page.page.locator(selector).first.screenshot()))
        assert len(seen.convert("RGB").getcolors(1 << 24) or range(99)) > 20, "an empty picture"
        if folder:
            path = Path(folder) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            seen.convert("RGB").quantize(128).save(path, optimize=True)
            assert path.stat().st_size < LIMIT

    return take


def test_a_reference_notebook_runs(opened: Callable[..., Page]) -> None:
    page = opened("01_naming.ipynb")
    page.run_all()
    page.wait_for_cells()
    page.check()
    cells = page.page.evaluate("() => document.querySelectorAll('.jp-CodeCell').length")
    assert cells >= 5


def test_the_onion_explorer(
    opened: Callable[..., Page], shoot: Callable[[Page, str, str], None], folder_of_lab: Path
) -> None:
    page = opened("interactive/onion_explorer.ipynb", 1100, 2600)
    page.run_all()
    page.wait_for_cells()
    p = page.page
    p.wait_for_selector(".chip.aprlab-current")
    p.click(".chip[data-key='GH-191']")  # off
    p.click(".chip[data-key='GH-190']")
    p.wait_for_selector(".chip.aprlab-current[data-key='GH-190']")
    p.click(".chip[data-key='q4k-min-lost']")
    p.wait_for_selector(".chip.aprlab-current[data-key='q4k-min-lost']")
    p.click("button:text-is('run')")
    page.says("✗ broken")
    page.says("refused: unknown tensor name")
    p.click(".aprlab-clickable tr[data-key='1']")  # the figure of the second finding
    p.wait_for_selector(f"{WIDGET} img >> visible=true")
    page.settle()
    p.click(".repair[data-key='naming/GH-190']")
    page.says("repaired: naming/GH-190")
    page.settle()
    assert "the same words" not in p.locator(WIDGET).first.inner_text()
    p.click(".repair[data-key='decode/q4k-min-lost']")
    page.says("✓ the same words")
    page.settle()
    p.click("button:text-is('save the repaired file')")
    page.says("with these repairs it says what the reference says")
    page.check()
    shoot(page, WIDGET, "onion-explorer")
    saved = folder_of_lab / "notebooks/interactive/fixed.apr"
    assert compare(open_model(paths.embedded_model()), open_model(saved)).equal
    p.fill("input[placeholder*='instead of faults']", "../../models/broken.apr")
    p.press("input[placeholder*='instead of faults']", "Enter")
    p.wait_for_selector(".repair", state="hidden")
    p.click("button:text-is('run')")
    page.says("the suspect is one or the other")
    p.click("button:text-is('no faults')")
    p.click("button:text-is('run')")
    page.says("✗ GH-191")
    page.settle()
    p.set_viewport_size({"width": 560, "height": 3400})
    page.settle()
    over = p.evaluate(
        "() => { const e = document.querySelector('.jp-OutputArea-output .widget-vbox'); return e.scrollWidth - e.clientWidth }"
    )
    assert over <= 2, "the widget is wider than a narrow window"
    shoot(page, WIDGET, "onion-explorer-narrow")


def pictures(page: Page, count: int) -> None:
    """Until so many figures are to be seen."""
    page.page.wait_for_function(
        f"() => [...document.querySelectorAll('{WIDGET} img')].filter(e => e.offsetParent).length == {count}"
    )
    page.settle()


def test_a_figure_is_live_in_a_notebook_that_nobody_trusts(
    opened: Callable[..., Page], shoot: Callable[[Page, str, str], None]
) -> None:
    """Hover, enlarge, zoom by a box, back; the same by keyboard. Nothing was run: the data came with the notebook."""
    page = opened("04_forward_pass.ipynb", 1100, 1100)
    page.page.wait_for_selector(".aprlab-live")
    assert page.page.locator(".jp-RenderedImage").count() == 0, "a picture without its data"
    maps = page.page.locator(".aprlab-live", has=page.page.locator("img[alt*='in its own run']"))
    image = maps.locator("img").bounding_box()
    place = {"x": 0.2 * image["width"], "y": 0.15 * image["height"]}
    maps.locator("img").hover(position=place)
    told = maps.locator("[aria-hidden='true']").first.inner_text()
    layer, step = told.split(": ")[0].split(" · ")
    assert layer.startswith("layer ") and step.isidentifier() and float(told.split(": ")[1]) > 0, told
    maps.locator("img").click(position=place)
    maps.locator("canvas").scroll_into_view_if_needed()
    page.page.mouse.move(10, 10)
    canvas = maps.locator("canvas").bounding_box()
    whole = maps.locator("canvas").screenshot()
    page.page.mouse.move(canvas["x"] + 150, canvas["y"] + 80)
    page.page.mouse.down()
    page.page.mouse.move(canvas["x"] + 350, canvas["y"] + 200, steps=3)
    page.page.mouse.up()
    assert maps.locator("canvas").screenshot() != whole, "a box zooms in"
    page.page.mouse.dblclick(canvas["x"] + 200, canvas["y"] + 100)
    page.page.mouse.move(10, 10)
    assert maps.locator("canvas").screenshot() == whole, "a double click shows all"
    page.page.mouse.move(canvas["x"] + 300, canvas["y"] + 150)
    shoot(page, ".aprlab-live:has(canvas:visible)", "live-figure")
    page.page.keyboard.press("Escape")
    assert maps.locator("img").is_visible() and not maps.locator("canvas").is_visible()
    for key in ("ArrowRight", "ArrowRight", "Enter", "+", "ArrowUp"):
        page.page.keyboard.press(key)
    assert maps.locator("[role='status']").inner_text() == "enlarged: biases lost: introduced"
    page.check()


@pytest.mark.parametrize("name", ["00_golden_rule", "06_ticket_revisited", "07_peel"])
def test_a_committed_notebook_is_the_same_when_it_was_opened_and_saved(
    opened: Callable[..., Page], folder_of_lab: Path, name: str
) -> None:
    path = folder_of_lab / "notebooks" / f"{name}.ipynb"
    before, then = path.read_bytes(), path.stat().st_mtime_ns
    page = opened(path.name)
    page.page.click(".jp-Notebook-cell >> nth=0")
    page.page.keyboard.press("Control+s")
    for _ in range(2 * SECONDS):
        if path.stat().st_mtime_ns != then:
            break
        page.page.wait_for_timeout(500)
    assert path.stat().st_mtime_ns != then, "it was not saved"
    saved, committed = json.loads(path.read_bytes()), json.loads(before)
    assert saved["metadata"].pop("language_info")["name"] == committed["metadata"].pop("language_info")["name"]
    assert json.dumps(saved) == json.dumps(committed)  # JupyterLab adds the version of the Python that is there, nothing else


def test_an_exported_page_is_live_without_a_server(browser: Any, tmp_path: Path) -> None:
    write_page = notebooks._write_page
    write_page(paths.notebooks_dir() / "06_ticket_revisited.ipynb", tmp_path / "page.html")
    page = new_page(browser, 1000, 900)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    figure = page.locator(".aprlab-live")
    figure.scroll_into_view_if_needed()
    box = figure.locator("img").bounding_box()
    page.mouse.move(box["x"] + 0.14 * box["width"], box["y"] + 0.8 * box["height"])
    assert figure.locator("[aria-hidden='true']").first.inner_text() == "quantised, the file: 198"
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    page.close()


def test_the_trace_explorer(opened: Callable[..., Page], shoot: Callable[[Page, str, str], None]) -> None:
    page = opened("interactive/trace_explorer.ipynb", 1100, 1900)
    page.run_all()
    page.wait_for_cells()
    page.page.wait_for_selector(".heat")
    assert page.in_view(".chip.aprlab-current[data-key='rope-norm']")  # chosen from the start, far down
    page.page.click("td[data-key='layers.0.q_rope']")
    page.says("the values furthest apart")
    pictures(page, 2)
    page.check()
    shoot(page, WIDGET, "trace-explorer")
    page.page.click(".chip[data-key='lost-k-biases']")
    page.page.wait_for_selector(".heat", state="hidden")  # what was run before is forgotten
    assert page.in_view(".chip.aprlab-current[data-key='lost-k-biases']")  # and not the first one scrolled back to
    page.page.click("button:text-is('run')")
    page.page.wait_for_selector(".heat")
    page.page.click("td[data-key='layers.0.k']")  # rotated keys come behind it: this is the second fault's
    page.says("the values furthest apart")
    pictures(page, 2)
    page.check()


def test_the_tensor_browser(opened: Callable[..., Page], shoot: Callable[[Page, str, str], None]) -> None:
    page = opened("interactive/tensor_browser.ipynb", 1100, 1500)
    page.run_all()
    page.wait_for_cells()
    page.page.click("th[data-key='sort:bytes']")
    page.says("bytes ▲")  # rows move
    page.page.click("tr[data-key='row:blk.0.attn_k.weight']")
    page.says("decoded values (XXH3)")
    pictures(page, 1)
    page.check()
    shoot(page, WIDGET, "tensor-browser")


def test_the_block_microscope(opened: Callable[..., Page], shoot: Callable[[Page, str, str], None]) -> None:
    page = opened("interactive/block_microscope.ipynb", 1100, 2000)
    page.run_all()
    page.wait_for_cells()
    page.page.click("span[data-key='byte:6']")
    page.page.wait_for_selector("tr.aprlab-current[data-key^='value:']")
    pictures(page, 1)
    page.says("the scales decoded")
    page.page.focus("span[data-key='byte:6']")
    focused = "() => document.activeElement.dataset.key"
    for press, place in (("ArrowRight", 7), ("ArrowDown", 23), ("ArrowLeft", 22), ("ArrowUp", 6), ("Home", 0), ("ArrowUp", 0)):
        page.page.keyboard.press(press)
        assert page.page.evaluate(focused) == f"byte:{place}", press
    stops = "() => document.querySelectorAll('[data-map=bytes] [tabindex=\"0\"]').length"
    assert page.page.evaluate(stops) == 1
    page.page.keyboard.press("End")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("span.aprlab-current[data-key='byte:143']")
    assert page.page.evaluate(focused) == "byte:143"
    page.page.click("span[data-key='byte:6']")
    page.page.wait_for_selector("span.aprlab-current[data-key='byte:6']")
    pictures(page, 1)
    # Byte 2 of the scales: six bits are the scale of group 2, two belong to group 6; numbers that are zero do not change.
    assert 32 < page.page.locator("tr.aprlab-current[data-key^='value:']").count() <= 64
    page.check()
    shoot(page, WIDGET, "block-microscope")


def test_the_kernel_stepper(opened: Callable[..., Page], shoot: Callable[[Page, str, str], None]) -> None:
    page = opened("interactive/kernel_stepper.ipynb", 1200, 1700)
    page.run_all()
    page.wait_for_cells()
    page.page.click("button:text-is('run all, count, check')")
    page.says("the result of all blocks is right")
    marked = "[...document.querySelectorAll('.code .aprlab-current')].map(e => e.dataset.key)"
    before = page.page.evaluate(f"() => {marked}")
    assert len(before) == 2  # one line of each text
    page.page.click("button:text-is('ten lines')")
    moved = f"before => {{ const now = {marked}; return now.length == 2 && now[0] != before[0] }}"
    page.page.wait_for_function(moved, arg=before)
    page.settle()
    page.check()
    shoot(page, WIDGET, "kernel-stepper")


def test_a_model_file_opens_by_double_click(browser: Any, lab: str, shoot: Callable[[Page, str, str], None]) -> None:
    address = lab.replace("/doc/tree/notebooks/{}", "/lab")
    p = new_page(browser, 1200, 1300)
    p.set_default_timeout(1000 * SECONDS)
    complaints: list[str] = []
    asked: list[str] = []
    p.on("pageerror", lambda error: complaints.append(str(error)))
    p.on("request", lambda request: asked.append(request.url))
    try:
        p.goto(address)
        p.wait_for_selector(".jp-LauncherCard >> text=One file")
        p.dblclick(".jp-DirListing-item[title*='models']")
        p.dblclick(".jp-DirListing-item[title*='tiny.gguf']")
        p.wait_for_selector(".aprlab-tensors tbody tr >> nth=98")
        p.fill(".aprlab-file input[type=search]", "ATTN q.weight")
        p.wait_for_function("() => document.querySelectorAll('.aprlab-tensors tbody tr').length == 8")
        p.focus(".aprlab-tensors tr[data-key='blk.2.attn_q.weight']")
        p.keyboard.press("Enter")
        p.wait_for_selector(".aprlab-detail .bytes")
        p.wait_for_selector(".aprlab-detail img[alt*='blk.2.attn_q.weight']")
        shoot(SimpleNamespace(page=p), ".aprlab-file", "model-file")
        p.fill(".aprlab-detail input >> nth=0", "255")
        p.press(".aprlab-detail input >> nth=0", "Enter")
        p.wait_for_function("() => document.querySelector('.aprlab-detail input').value == '255'")
        p.fill(".aprlab-file input[aria-label='other file']", "models/broken.apr")
        p.click("text=compare with it")
        p.wait_for_selector("text=breaks the size law")
        first = p.locator(".aprlab-tensors tbody tr").first.inner_text()
        assert "type" in first or "unreadable" in first, "differences come first"
        p.fill(".aprlab-file input[aria-label='other file']", "models/no-such.gguf")
        p.click("text=compare with it")
        p.wait_for_selector(".aprlab-words >> text=no-such.gguf")
        p.dblclick(".jp-DirListing-item[title*='broken.apr']")
        p.click("text=open as notebook >> visible=true")
        p.wait_for_selector(".jp-Notebook-cell >> text=candidate: str = \"broken.apr\"")
        assert not [line for line in complaints if "ResizeObserver" not in line]
        loads = [url for url in asked if "/api/contents/models/tiny.gguf" in url and "content=1" in url]
        assert not loads, "JupyterLab fetched the whole file"
    finally:
        p.close()


def test_the_tab_leaves_no_copy_of_a_model(lab: str, folder_of_lab: Path) -> None:
    copies = {path.name for path in folder_of_lab.rglob("*checkpoint*") if path.suffix in (".gguf", ".apr")}
    assert not copies, "gigabytes, where the model is a real one"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("file?path=models/tiny.gguf", 200),
        ("file?path=../models/tiny.gguf", 404),
        ("file?path=models/../../tiny.gguf", 404),
        ("file?path=.hidden/tiny.gguf", 404),
        ("file?path=notebooks/index.ipynb", 404),
        ("file?path=models/none.gguf", 404),
        ("file", 400),
        ("tensor?path=models/tiny.gguf&name=none", 400),
        ("tensor?path=models/tiny.gguf", 400),
        ("block?path=models/tiny.gguf&name=token_embd.weight&row=x", 400),
        ("block?path=models/tiny.gguf&name=token_embd.weight&row=99999999", 200),
    ],
)
def test_the_server_part_obeys_root_and_token(lab: str, folder_of_lab: Path, query: str, status: int) -> None:
    (folder_of_lab / ".hidden").mkdir(exist_ok=True)
    shutil.copy(paths.embedded_model(), folder_of_lab / ".hidden" / "tiny.gguf")
    shutil.copy(paths.embedded_model(), folder_of_lab.parent / "tiny.gguf")
    address = lab.split("/doc/")[0] + "/aprlab/" + query

    def answer(headers: dict[str, str]) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    found, text = answer({"Authorization": "token aprlab"})
    assert found == status, text
    assert "Traceback" not in text and str(folder_of_lab) not in text
    assert answer({})[0] == 403
