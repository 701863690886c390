"""Kill a verb with SIGKILL at random moments: its output is absent or whole, and the next run succeeds.

    python tests/trust/kill.py --moments 50                  # all verbs; a table
    python tests/trust/kill.py --moments 5 --only convert    # as the test does it; --json for plain data

Each run is a fork of this process, which has everything imported, so that a moment falls into the work and not into
Python's start. Half of the moments are spread over the whole run, half over its last fifth, where files get their names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
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
from aprlab.conversion.converter import convert, export  # noqa: E402
from aprlab.faults import convert_with  # noqa: E402
from aprlab.formats import open_model  # noqa: E402
from aprlab.lab import sweeps as sweep  # noqa: E402
from aprlab.model import hub  # noqa: E402
from aprlab.gates.repairs import repair  # noqa: E402
from aprlab.published import KnownModel  # noqa: E402


@dataclass
class Job:
    """A run that writes `output` in the folder it is given; `whole` says whether what lies there is the full thing."""

    name: str
    run: Callable[[Path], object]
    output: str
    whole: Callable[[Path], bool] | None = None  # None: the same bytes as an undisturbed run's


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
    seconds: float = 0.0  # of an undisturbed run

    @property
    def holds(self) -> bool:
        return self.broken == 0 and self.rerun == self.moments and self.absent + self.whole == self.moments


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
        job.run(folder)
        status = 0
    finally:
        os._exit(status)


def ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def tally(job: Job, moments: int, rng: random.Random, place: Path) -> Tally:
    """Kill `job` at so many moments, in a new folder each time."""
    taken = []
    for attempt in "abc":
        fresh = place / job.name / attempt
        fresh.mkdir(parents=True)
        started = time.perf_counter()
        assert os.waitstatus_to_exitcode(os.waitpid(child(job, fresh), 0)[1]) == 0, f"{job.name} fails undisturbed"
        taken.append(time.perf_counter() - started)
    seconds = min(taken)
    due = "" if job.whole else digest(fresh / job.output)
    whole = job.whole or (lambda path: digest(path) == due)
    assert whole(fresh / job.output)
    result = Tally(job.name, moments, seconds=round(seconds, 3))
    for moment in range(moments):
        folder = place / job.name / str(moment)
        folder.mkdir()
        at = rng.uniform(0, seconds) if moment % 2 else rng.uniform(0.8, 1) * seconds
        pid = child(job, folder)
        time.sleep(at)
        if ended(pid):
            result.finished += 1
        else:
            with suppress(ProcessLookupError):  # the session is not there yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        output = folder / job.output
        if not output.exists():
            result.absent += 1
        elif whole(output):
            result.whole += 1
        else:
            result.broken += 1
        result.litter += any(p != output for p in folder.iterdir())
        status = os.waitstatus_to_exitcode(os.waitpid(child(job, folder), 0)[1])
        result.rerun += status == 0 and whole(output)
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


def jobs(place: Path) -> dict[str, Job]:
    """The verbs that write."""
    tiny = paths.embedded_model()
    source = small(tiny, place / "s.gguf")
    convert(source, place / "s.apr")
    convert_with(tiny, place / "broken.apr", ["GH-190"])
    notebook(place / "s.ipynb")
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
        Job("repair", lambda f: repair(place / "broken.apr", f / "o.apr", tiny, force=True), "o.apr"),
        Job("sweep", lambda f: sweep.sweep(place / "m.yaml", f / "o"), "o", page_fits),
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
