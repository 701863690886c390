"""Files made to exhaust a reader, and what they cost: made here, opened by the command line in a process of their own.

    python tests/trust/attacks.py              # all of them, as the table of docs/trust.md
    python tests/trust/attacks.py --only ptx   # those whose name begins so
    python tests/trust/attacks.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

SECONDS, MEGABYTES = 2.0, 300
HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
Words = tuple[str | Path, ...]


@dataclass(frozen=True)
class Attack:
    """One file and the command that opens it. `status`: the exit status that is right; `seconds`: the most it may take."""

    name: str
    what: str
    make: Callable[[Path], Words]
    status: int = 2
    seconds: float = SECONDS


@dataclass
class Cost:
    """What one command took: the processor's seconds, the peak in MB, and its last line."""

    name: str
    what: str
    nbytes: int
    status: int
    seconds: float
    megabytes: int
    lines: int
    said: str
    right: bool


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def ptx(text: str) -> Callable[[Path], Words]:
    def make(folder: Path) -> Words:
        (folder / "a.ptx").write_text(HEAD + text)
        return "ptx", "entries", folder / "a.ptx"

    return make


def doubling_calls(depth: int) -> str:
    text = ".func f0()\n{\nret;\n}\n"
    for n in range(1, depth):
        text += f".func f{n}()\n{{\ncall f{n - 1};\ncall f{n - 1};\nret;\n}}\n"
    return text + f".visible .entry k()\n{{\ncall f{depth - 1};\nret;\n}}\n"


def chain_of_calls(depth: int) -> str:
    text = ".func f0()\n{\nret;\n}\n" + "".join(f".func f{n}()\n{{\ncall f{n - 1};\nret;\n}}\n" for n in range(1, depth))
    return text + f".visible .entry k()\n{{\ncall f{depth - 1};\nret;\n}}\n"


def entry(body: str) -> str:
    return f".visible .entry k()\n{{\n{body}\nret;\n}}\n"


def yaml(text: str, verb: str = "sweep") -> Callable[[Path], Words]:
    def make(folder: Path) -> Words:
        (folder / "a.yaml").write_text(text)
        if verb == "sweep":
            return "sweep", folder / "a.yaml", "--out", folder / "out"
        return "qualify", tiny(), "--playbook", folder / "a.yaml", "--out", folder / "out"

    return make


def aliases() -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join(lines) + "\n"


def matrix(side: int) -> str:
    axes = "\n".join(f"  {name}: [{', '.join(map(str, range(side)))}]" for name in ("a", "b", "c"))
    return f"notebooks: [07_peel]\nmatrix:\n{axes}\n"


def playbook(expect: str, text: str = "What is 2+2?") -> str:
    return f"name: a\ntitle: a\nformats: [gguf]\nscenarios:\n  - id: a\n    area: QUAL\n    ask: {text}\n    expect: [{expect}]\n"


def tiny() -> Path:
    from aprlab import paths

    return paths.embedded_model()


def apr_file(folder: Path, claimed: int) -> Words:
    """A sound zstd file of zeros but for the size that its index claims for one tensor: consistent, and a terabyte."""
    import zstandard

    from aprlab.formats.apr import Entry, header_crc
    from aprlab.formats.apr.layout import FLAGS, HEADER

    rows = Entry("model.norm.weight", 0, (claimed // 4,), 0, claimed).pack()
    text = b"{}" + b" " * 62
    index_at = 64 + len(text)
    data_at = index_at + len(rows) + (-len(rows)) % 64
    flags = FLAGS["zstd"] | FLAGS["row_major"]
    header = bytearray(HEADER.pack(b"APR\0", 2, 0, flags, 1, 64, len(text), index_at, data_at, 0))
    header[40:44] = header_crc(bytes(header)).to_bytes(4, "little")
    packer = zstandard.ZstdCompressor().compressobj()
    body = packer.compress(text + rows + bytes(data_at - index_at - len(rows)))
    with open(folder / "a.apr", "wb") as file:
        file.write(bytes(header) + body)
        for _ in range(100):
            file.write(packer.compress(bytes(1 << 22)))
        file.write(packer.flush())
    return "inspect", folder / "a.apr"


def trace_file(folder: Path) -> Words:
    """An .npz of half a MB whose one array unpacks to 600 MB."""
    import numpy as np

    count = 600_000_000 // 4
    with zipfile.ZipFile(folder / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = {"kind": "aprlab trace", "version": 1, "points": {"embed": {"shape": [count], "positions": 0}}}
        with archive.open("header.npy", "w") as file:
            np.lib.format.write_array(file, np.frombuffer(json.dumps(header).encode(), np.uint8))
        with archive.open("embed.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
            for _ in range(4 * count // (1 << 24)):
                file.write(bytes(1 << 24))
    return "!load", folder / "t.npz"


def huggingface(change: Callable[[Path], None]) -> Callable[[Path], Words]:
    def make(folder: Path) -> Words:
        model = folder / "m"
        model.mkdir()
        change(model)
        return "inspect", model

    return make


def config_device(model: Path) -> None:
    weights(model)
    (model / "config.json").symlink_to("/dev/zero")


def config_pipe(model: Path) -> None:
    weights(model)
    os.mkfifo(model / "config.json")


def weights(model: Path) -> None:
    header = b'{"model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def shard(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        (model / "config.json").write_text("{}")

    return change


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def many_tensors(folder: Path) -> Words:
    """100,000 tensors of one value, each with its row in the index."""
    rows = b"".join(text(f"t.{n}.weight") + struct.pack("<IQIQ", 1, 8, 0, 32 * n) for n in range(100_000))
    fields = text("general.architecture") + struct.pack("<I", 8) + text("qwen2")
    head = struct.pack("<4sIQQ", b"GGUF", 3, 100_000, 1) + fields + rows
    (folder / "a.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(32 * 100_000))
    return "!open", folder / "a.gguf"


def looped_output(folder: Path) -> Words:
    (folder / "a.apr").symlink_to("b.apr")
    (folder / "b.apr").symlink_to("a.apr")
    return "convert", tiny(), "-o", folder / "a.apr"


ANSWERS = {
    "a run of 200,000 sevens": ("arithmetic", "7" * 200_000, "4"),
    "a number of 309 digits": ("arithmetic", "9" * 309, "4"),
    "200,000 empty lines": ("arithmetic", "\n" * 200_000, "4"),
    "400 functions inside each other": ("code", "".join(" " * n + "def f():\n" for n in range(400)), "{'language': 'python'}"),
    "100,000 open brackets": ("code", "(" * 100_000, "{'language': 'python'}"),
}


def answer(name: str, given: str, argument: str) -> Callable[[Path], Words]:
    def make(folder: Path) -> Words:
        (folder / "answer.txt").write_text(given)
        return "!judge", folder / "answer.txt", name, argument

    return make


ATTACKS = [
    Attack("ptx registers", "a billion registers declared in one line", ptx(entry(".reg .b32 %r<1000000000>;"))),
    Attack("ptx doubling calls", "30 functions that call each other twice", ptx(doubling_calls(30)), 0),
    Attack("ptx chain of calls", "5,000 functions, each calls the next", ptx(chain_of_calls(5000)), 0),
    Attack("ptx comments", "100,000 comments that are never closed", ptx("/* " * 100_000)),
    Attack("ptx empty lines", "300,000 empty lines", ptx("\n" * 300_000 + entry("")), 0),
    Attack("ptx number", "a file number of 5,000 digits", ptx(f'.file {"9" * 5000} "x"\n')),
    Attack("ptx variable", "a variable of a terabyte", ptx(".global .b8 a[1000000000000] = {1};\n")),
    Attack("ptx product", "a constant of a megabit", ptx(f".global .b8 a[{'*'.join(['18446744073709551615'] * 16000)}];\n")),
    Attack("ptx negation", "! on a register that is not a predicate", ptx(entry(".reg .b32 %r<2>;\nmov.u32 %r1, !%tid.x;"))),
    Attack("yaml aliases", "396 bytes that stand for 9^9 words", yaml(aliases())),
    Attack("yaml aliases, playbook", "the same as a playbook", yaml(aliases(), "qualify")),
    Attack("yaml matrix", "a matrix of 400 × 400 × 400", yaml(matrix(400))),
    Attack("yaml number", "a hexadecimal number of 100,000 digits", yaml(playbook("arithmetic: 0x" + "f" * 100_000), "qualify")),
    Attack("yaml tag", "a truth value that is none", yaml("notebooks: !!bool maybe\n")),
    Attack("apr claim", "a zstd body that claims a terabyte of zeros", lambda folder: apr_file(folder, 10**12)),
    Attack("trace", "an npz that unpacks to 600 MB", trace_file),
    Attack("config device", "config.json is /dev/zero", huggingface(config_device)),
    Attack("config pipe", "config.json is a pipe without a writer", huggingface(config_pipe)),
    Attack("shard NUL", "a NUL in a shard's name", huggingface(shard("x\0y"))),
    Attack("shard traversal", "a shard outside of the folder", huggingface(shard("../../etc/passwd"))),
    Attack("gguf many tensors", "100,000 tensors (35 µs each)", many_tensors, 0, 8.0),
    Attack("output loop", "an output that is a circle of links", looped_output),
    *(Attack(f"answer {n}", what, answer(*given), 0) for n, (what, given) in enumerate(ANSWERS.items(), 1)),
]

_OPEN = """
import sys
from aprlab.formats import gguf
print(len(gguf.open_model(sys.argv[1]).tensors), "tensors")
"""
_LOAD = """
import sys
from aprlab.errors import AprlabError
from aprlab.tracing.traces import Trace
try:
    Trace.load(sys.argv[1])
except AprlabError as error:
    sys.exit(print(f"aprlab: {error}", file=sys.stderr) or error.exit_code)
"""
_JUDGE = """
import ast, sys
from pathlib import Path
from aprlab.qualification.oracles import Answer, judge
answer = Answer(text=Path(sys.argv[1]).read_text(), stop="length")
word = judge(sys.argv[2], answer, ast.literal_eval(sys.argv[3]), "What is 2+2?")
assert word.passed is False
print(f"does not pass: {word.said}")
"""


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(attack: Attack, place: Path, program: list[str] | None = None) -> Cost:
    """Make the file, open it, and look at what that took. Runs in a small process: a child begins with its parent's peak."""
    program = program or [sys.executable, "-m", "aprlab"]
    folder = place / attack.name.replace(" ", "-")
    folder.mkdir()
    words = [str(word) for word in attack.make(folder)]
    nbytes = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    own = {"!open": _OPEN, "!load": _LOAD, "!judge": _JUDGE}
    command = [sys.executable, "-c", own[words[0]], *words[1:]] if words[0] in own else [*program, *words]
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if not pid:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os.environ |= {"COLUMNS": "300", "TMPDIR": str(folder)}
            os.execv(command[0], command)
        ends, used = time.monotonic() + 60, None
        while used is None and time.monotonic() < ends:
            found, status, usage = os.wait4(pid, os.WNOHANG)
            used = usage if found else time.sleep(0.02)
        if used is None:
            os.kill(pid, 9)
            _, status, used = os.wait4(pid, 0)
        said.seek(0)
        lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    code, seconds, peak = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss // 1024
    last = (lines or [""])[-1].replace(str(folder), "…")
    right = code == attack.status and seconds < attack.seconds and peak < MEGABYTES and (attack.status != 2 or len(lines) == 1)
    return Cost(attack.name, attack.what, nbytes, code, round(seconds, 2), peak, len(lines), last[:200], right)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="Those whose name begins so.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    costs = []
    with tempfile.TemporaryDirectory() as place:
        if not options.json:
            print("| file | bytes | status | seconds | MB | the last line |\n|---|---|---|---|---|---|")
        for attack in ATTACKS:
            if attack.name.startswith(options.only):
                costs.append(c := measure(attack, Path(place)))
                if not options.json:
                    said = c.said.replace("|", "\\|")
                    mark = "" if c.right else " **too much**"
                    took = f"{c.nbytes:,} | {c.status} | {c.seconds:.1f} | {c.megabytes}{mark}"
                    print(f"| {c.what} | {took} | `{said[:110]}` |", flush=True)
    if options.json:
        print(json.dumps([asdict(cost) for cost in costs]))
    return int(not costs or not all(cost.right for cost in costs))


if __name__ == "__main__":
    sys.exit(main())
