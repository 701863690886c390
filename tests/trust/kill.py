"""Kill a verb with SIGKILL at random moments: its output is absent or whole, and the next run succeeds.

    python tests/trust/kill.py --moments 50                  # all verbs; a table
    python tests/trust/kill.py --moments 5 --only convert    # as the test does it; --json for plain data

Each run is a fork of this process, which has everything imported, so that a moment falls into the work and not into
Python's start. Half of the moments are spread over the whole run, half over its last fifth, where files get their names.
TMPDIR is a folder of the run's own: what lies there, or next to the output, after the next run is a leftover.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # a fork has none of its parent's threads
sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))

import nbformat  # noqa: E402
import numpy as np  # noqa: E402
from nbformat.v4 import new_code_cell, new_notebook  # noqa: E402
from test_fuzz import small  # noqa: E402

from aprlab import paths  # noqa: E402
from aprlab.cli.app import run_cli  # noqa: E402
from aprlab.conversion.converter import convert, export  # noqa: E402
from aprlab.faults import convert_with  # noqa: E402
from aprlab.formats import open_model  # noqa: E402
from aprlab.gates.repairs import repair  # noqa: E402
from aprlab.lab import sweeps as sweep  # noqa: E402
from aprlab.model import hub  # noqa: E402
from aprlab.published import KnownModel  # noqa: E402


@dataclass
class Job:
    """A run that writes `output` in the folder it is given; `whole` says whether what lies there is the full thing."""

    name: str
    run: Callable[[Path], object]
    output: str
    whole: Callable[[Path], bool] | None = None  # None: the same bytes as an undisturbed run's
    prepare: Callable[[Path], object] = lambda folder: None  # before the run that is killed
    always: bool = False  # the output is there before the run: old or new, and never gone
    share: float = 1.0  # of the moments; less for what takes long


@dataclass
class Tally:
    verb: str
    moments: int
    finished: int = 0  # ended before the signal came
    absent: int = 0
    whole: int = 0
    broken: int = 0
    litter: int = 0  # moments after which something else lay in the folder
    rerun: int = 0  # of the runs after a kill, how many succeeded
    left: int = 0  # runs after a kill that left something in TMPDIR or next to the output
    seconds: float = 0.0  # of an undisturbed run

    @property
    def holds(self) -> bool:
        whole = self.broken == 0 and self.absent + self.whole == self.moments
        return whole and self.rerun == self.moments and self.left == 0


def digest(path: Path) -> str:
    """Of a file, or of a folder's files with their names."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()


def child(job: Job, folder: Path) -> int:
    """A fork that runs the job in a session of its own; its process id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        temporary = folder.with_name(f"{folder.name}-tmp")
        temporary.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        job.run(folder)
        status = 0
    except BaseException:
        (folder.parent / "why").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def kill(pid: int) -> None:
    """The run and all that it has started, or only the run: what it started must end by itself."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def leftovers(folder: Path, output: Path) -> bool:
    """Something next to the output or in TMPDIR, once what has lost its parent is gone.

    Jupyter's own file for the connection to a kernel (``tmp….json``, some 300 bytes) is not counted: aprlab does not name it.
    """
    temporary = folder.with_name(f"{folder.name}-tmp")
    for _ in range(40):
        rest = [*(p for p in folder.iterdir() if p != output), *temporary.glob("aprlab-*"), *temporary.glob("tmp*[!n]")]
        if not rest:
            return False
        time.sleep(0.05)
    return True


def tally(job: Job, moments: int, rng: random.Random, place: Path) -> Tally:
    """Kill `job` at so many moments, in a new folder each time."""
    moments = max(1, round(moments * job.share))
    taken = []
    for attempt in "abc":
        fresh = place / job.name / attempt
        fresh.mkdir(parents=True)
        job.prepare(fresh)
        started = time.perf_counter()
        status = os.waitstatus_to_exitcode(os.waitpid(child(job, fresh), 0)[1])
        why = fresh.parent / "why"
        assert status == 0, f"{job.name} fails undisturbed: {why.read_text() if why.exists() else status}"
        taken.append(time.perf_counter() - started)
    seconds = min(taken)
    due = "" if job.whole else digest(fresh / job.output)
    whole = job.whole or (lambda path: digest(path) == due)
    assert whole(fresh / job.output), f"{job.name} is not whole undisturbed"
    result = Tally(job.name, moments, seconds=round(seconds, 3))
    for moment in range(moments):
        folder = place / job.name / str(moment)
        folder.mkdir()
        job.prepare(folder)
        before = digest(folder / job.output) if job.always else ""
        at = rng.uniform(0, seconds) if moment % 2 else rng.uniform(0.8, 1) * seconds
        pid = child(job, folder)
        time.sleep(at)
        if ended(pid):
            result.finished += 1
        else:
            kill(pid)
        output = folder / job.output
        if not output.exists() and not job.always:
            result.absent += 1
        elif output.exists() and (whole(output) or (job.always and digest(output) == before)):
            result.whole += 1
        else:
            result.broken += 1
        result.litter += any(p != output for p in folder.iterdir())
        status = os.waitstatus_to_exitcode(os.waitpid(child(job, folder), 0)[1])
        result.rerun += status == 0 and whole(output)
        result.left += leftovers(folder, output)
    return result


def serve(content: bytes) -> str:
    """A hub on the loopback with one file, sent in pieces; its address."""
    sha = hashlib.sha256(content).hexdigest()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(b"")

        def do_GET(self) -> None:
            self.answer(content)

        def answer(self, body: bytes) -> None:
            wanted = self.headers.get("Range") if body else None
            body = body[int(wanted.removeprefix("bytes=").split("-")[0]) :] if wanted else body
            self.send_response(206 if wanted else 200)
            for key, value in {
                "X-Repo-Commit": "0" * 40, "ETag": f'"{sha}"', "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": len(content),
                "Content-Length": len(body) if body or wanted else len(content),
            }.items():  # fmt: skip
                self.send_header(key, str(value))
            self.end_headers()
            with suppress(OSError):
                for start in range(0, len(body), 1 << 16):
                    self.wfile.write(body[start : start + (1 << 16)])
                    time.sleep(0.002)

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """A client that was killed is what this is for."""

    server = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ.pop(name, None)
        os.environ.pop(name.lower(), None)
    return f"http://127.0.0.1:{server.server_port}"


PARAMETERS = 'count: int = 3  # how many\nout: str = ""  # folder'
FINDINGS = 'from aprlab import lab\nlab.write_findings("s", {"headline": "done", "checks": {"few": count < 9}}, out)'


def notebook(path: Path) -> None:
    """The smallest that a sweep takes."""
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(FINDINGS)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


PLAYBOOK = """\
name: one
title: one question
formats: [gguf, apr]
scenarios:
  - id: sum
    area: QUAL
    ask: What is 2+2?
    max_tokens: 3
    expect:
      - arithmetic: 4
"""


def unforced(path: Path) -> list[str]:
    return ["--force"] if path.exists() else []


def verb(*words: object, statuses: tuple[int, ...] = (0,)) -> None:
    """A command line, as it is typed."""
    status = run_cli([str(word) for word in words])
    assert status in statuses, f"{words}: {status}"


def pages_fit(folder: Path) -> bool:
    """No page, notebook or JSON in it is empty or cut."""
    for path in folder.rglob("*"):
        if path.suffix in (".ipynb", ".json"):
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":  # its last line may be cut: the next run leaves that out
            [json.loads(line) for line in path.read_text().splitlines()[:-1]]
        elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
            return False
    return True


def jobs(place: Path) -> dict[str, Job]:
    """The verbs that write."""
    tiny = paths.embedded_model()
    source = small(tiny, place / "s.gguf")
    convert(source, place / "s.apr")
    convert_with(tiny, place / "broken.apr", ["GH-190"])
    notebook(place / "s.ipynb")
    convert(tiny, place / "t.apr")
    export(tiny, place / "old", format="safetensors", dtype="f32")
    (place / "p.yaml").write_text(PLAYBOOK)
    (place / "m.yaml").write_text("notebooks: [s.ipynb]\nmatrix: {count: [1, 2]}\n")
    content = np.random.default_rng(3).bytes(3_000_000)
    known = KnownModel("k", "K", "owner/k", "k.gguf", {}, {}, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    hub.known_model = lambda name: known  # type: ignore[assignment]
    url = serve(content)
    open_model(place / "s.apr").close()
    listed = [
        Job("convert", lambda f: convert(source, f / "o.apr", force=True), "o.apr"),
        Job("compress", lambda f: convert(source, f / "o.apr", force=True, compress="zstd"), "o.apr"),
        Job("export", lambda f: export(place / "s.apr", f / "o.gguf", force=True), "o.gguf"),
        Job("safetensors", lambda f: export(tiny, f / "o", format="safetensors", dtype="f16", force=True), "o"),
        Job("fetch", lambda f: hub.fetch("k", folder=f, endpoint=url), "k.gguf"),
        Job("repair", lambda f: repair(place / "broken.apr", f / "o.apr", tiny, force=True), "o.apr", share=0.2),
        Job("replace", lambda f: export(tiny, f / "o", format="safetensors", dtype="f16", force=True), "o",
            prepare=lambda f: shutil.copytree(place / "old", f / "o"), always=True),
        Job("overwrite", lambda f: convert(source, f / "o.apr", force=True), "o.apr",
            prepare=lambda f: (f / "o.apr").write_bytes(b"what was there before"), always=True),
        Job("trace", lambda f: verb("trace", tiny, "-o", f / "o.npz", "--source", "reference", *unforced(f / "o.npz")), "o.npz",
            share=0.5),
        Job("gates", lambda f: verb("gates", tiny, place / "t.apr", "-n", 1, statuses=(0, 3, 4)), "", lambda path: True,
            share=0.2),
        Job("verify", lambda f: verb("verify", tiny, place / "t.apr", "--tokens", 64, "--out", f / "o", statuses=(0, 3, 4)),
            "o", pages_fit, share=0.2),
        Job("qualify", lambda f: verb("qualify", tiny, "--playbook", place / "p.yaml", "--out", f / "o", statuses=(0, 3, 4)),
            "o", pages_fit, share=0.2),
        Job("investigate", lambda f: verb("investigate", "--only", place / "s.ipynb", "--out", f / "o"),
            "o", pages_fit, share=0.2),
        Job("sweep", lambda f: sweep.sweep(place / "m.yaml", f / "o"), "o", page_fits, share=0.2),
    ]
    return {job.name: job for job in listed}



def page_fits(folder: Path) -> bool:
    """Every cell folder that has a record is whole, and a page that is there is not cut."""
    page = folder / "index.html"
    if page.exists() and not page.read_text().rstrip().endswith("</html>"):
        return False
    for record in folder.glob(f"*/{sweep.RECORD}"):
        json.loads(record.read_text())
        if not (record.parent / "s.ipynb").read_text().rstrip().endswith("}"):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng, seen = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as place:
        known = jobs(Path(place))
        for name in options.only.split(",") if options.only else known:
            seen.append(tally(known[name], options.moments, rng, Path(place)))
            if not options.json:
                print("ok " if seen[-1].holds else "BAD", seen[-1], flush=True)
    if options.json:
        print(json.dumps([asdict(row) | {"holds": row.holds} for row in seen]))
    return int(not all(row.holds for row in seen))


if __name__ == "__main__":
    sys.exit(main())
