# ruff: noqa: E501 - lines of CUDA source stay whole
"""Kernel faults: edits of the CUDA source that put a historical bug of block decoding into otherwise healthy kernels.

Every edit must match exactly once, so that a changed source cannot leave a fault without effect. The kernels that an edit
changes are shipped as PTX (`ptx/faults.tar.xz`), so that the PTX engine runs them with NumPy alone; a GPU compiles the edited
source. A fault enters an engine through its `kernels` option; the engine itself knows nothing of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from aprlab.errors import AprlabError, UsageError
from aprlab.kernels.cuda import compile as nvrtc

ARCHIVE = nvrtc.HERE / "ptx" / "faults.tar.xz"
RECORD = nvrtc.HERE / "ptx" / "faults.json"  # which sources the archive was compiled from


@dataclass(frozen=True, slots=True)
class Edit:
    """`find` is replaced in `file`, where it must occur exactly once."""

    file: str
    find: str
    replace: str

    def apply(self, text: str) -> str:
        """The edited text. Raises AprlabError unless there is one match."""
        matches = text.count(self.find)
        if matches != 1:
            raise AprlabError(
                f"{self.find!r} occurs {matches} times in {self.file}, expected once", code="cuda.mutation-does-not-match"
            )
        return text.replace(self.find, self.replace)


@dataclass(frozen=True, slots=True)
class Mutation:
    """One fault.

    Attributes:
        name: for the command line.
        summary: what is done wrong, in one line.
        types: names of the block types that decode wrongly.
        mark: what the fault leaves behind, as its history reports it.
        edits: what makes it.
        overrun: the faulty kernels read up to this many times the bytes of a tensor; buffers must be that long.
    """

    name: str
    summary: str
    types: tuple[str, ...]
    mark: str
    edits: tuple[Edit, ...]
    overrun: float = 1.0


_PAIRS = (  # four neighbouring nibbles of 16 bits, low ones first, one a byte
    "((h) & 0xfu) | ((h) & 0xf0u) << 4 | ((h) & 0xf00u) << 8 | ((h) & 0xf000u) << 12"
)


def _pairs(half: str) -> str:
    return f"({_PAIRS.replace('(h)', half)})"


_K = ("Q4_K", "Q5_K")
_ALL = [
    Mutation(
        "q4-nibble-pairs",
        "Q4_0 values read as neighbouring nibbles of a byte instead of all low nibbles, then all high ones",
        ("Q4_0",),
        "right set of values in wrong places; correlation about 0, weights look healthy by every statistic",
        (
            Edit(
                "dequantise.cu",
                "    const u32 q = load4(block + 2 + (i & 15)) >> (i < 16 ? 0 : 4);\n    return make_float4(__fmul_rn(d, (float)((int)(q & 15) - 8)),",
                f"    const u32 h = load2(block + 2 + i / 2), q = {_pairs('h')};\n    return make_float4(__fmul_rn(d, (float)((int)(q & 15) - 8)),",
            ),
            Edit("blocks.cuh", "enum { BYTES = 18, CENTRE = 8, NIBBLES = 1 };", "enum { BYTES = 18, CENTRE = 8, NIBBLES = 0 };"),
            Edit(
                "blocks.cuh",
                "DEVICE u32 bytes(const Q4_0 &t, int k) { return low4(t, k); }",
                f"DEVICE u32 bytes(const Q4_0 &t, int k) {{\n    const u32 h = t.q[k >> 3][(k & 7) >> 1] >> 16 * (k & 1);\n    return {_pairs('h')};\n  }}",
            ),
        ),
    ),
    Mutation(
        "q4k-nibble-pairs",
        "Q4_K chunks of 64 values read as neighbouring nibbles of a byte",
        ("Q4_K",),
        "salad of many languages",
        (
            Edit(
                "dequantise.cu",
                "    const u32 q = __ldg((const u32 *)(block + 16 + (i >> 6) * 32 + (i & 31)));\n"
                "    return k_values(block, i, q >> (i & 32 ? 4 : 0) & 0x0f0f0f0fu);",
                f"    const u32 h = load2(block + 16 + (i >> 6) * 32 + (i & 63) / 2);\n    return k_values(block, i, {_pairs('h')});",
            ),
            Edit("blocks.cuh", "enum { BYTES = 144, NIBBLES = 1 };", "enum { BYTES = 144, NIBBLES = 0 };"),
            Edit(
                "blocks.cuh",
                "DEVICE u32 bytes(const Q4_K &t, int k) { return low4(t, k); }",
                "DEVICE u32 bytes(const Q4_K &t, int k) {\n"
                f"    const u32 h = t.q[(k >> 4) * 8 + ((k & 15) >> 1)] >> 16 * (k & 1);\n    return {_pairs('h')};\n  }}",
            ),
        ),
    ),
    Mutation(
        "q4k-nibbles-exchanged",
        "Q4_K low and high nibbles of a byte exchanged (Q5_K too: it shares the code)",
        _K,
        "salad of many languages",
        (
            Edit(
                "dequantise.cu",
                "return k_values(block, i, q >> (i & 32 ? 4 : 0) & 0x0f0f0f0fu);",
                "return k_values(block, i, q >> (i & 32 ? 0 : 4) & 0x0f0f0f0fu);",
            ),
            Edit(
                "dequantise.cu",
                "return k_values(block, i, (q >> (i & 32 ? 4 : 0) & 0x0f0f0f0fu) | fifth << 4);",
                "return k_values(block, i, (q >> (i & 32 ? 0 : 4) & 0x0f0f0f0fu) | fifth << 4);",
            ),
            Edit("blocks.cuh", "DEVICE bool high(int k) { return k & 8; }", "DEVICE bool high(int k) { return !(k & 8); }"),
        ),
    ),
    Mutation(
        "q4k-one-scale",
        "Q4_K high nibbles take the scale and min of the low ones (Q5_K too)",
        _K,
        "layer means drift",
        (
            Edit("dequantise.cu", "s = i >> 5, at = 8 * (s & 3);", "s = i >> 5, at = 8 * (s & 2);"),
            Edit("blocks.cuh", "t.scales = k_scales(head, half);", "t.scales = (k_scales(head, half) & 0x00ff00ffu) * 0x101u;"),
            Edit("blocks.cuh", "t.mins = k_mins(head, half);", "t.mins = (k_mins(head, half) & 0x00ff00ffu) * 0x101u;"),
        ),
    ),
    Mutation(
        "q4k-16-bytes",
        "Q4_K sub-blocks of 32 values read from 16 bytes of their own instead of 32 bytes shared by two",
        ("Q4_K",),
        "layer means drift",
        (
            Edit(
                "dequantise.cu",
                "    const u32 q = __ldg((const u32 *)(block + 16 + (i >> 6) * 32 + (i & 31)));\n"
                "    return k_values(block, i, q >> (i & 32 ? 4 : 0) & 0x0f0f0f0fu);",
                "    const u32 q = __ldg((const u32 *)(block + 16 + (i >> 5) * 16 + (i & 15)));\n"
                "    return k_values(block, i, q >> (i & 16 ? 4 : 0) & 0x0f0f0f0fu);",
            ),
            Edit("blocks.cuh", "enum { BYTES = 144, NIBBLES = 1 };", "enum { BYTES = 144, NIBBLES = 0 };"),
            Edit(
                "blocks.cuh",
                "DEVICE u32 bytes(const Q4_K &t, int k) { return low4(t, k); }",
                "DEVICE u32 bytes(const Q4_K &t, int k) {\n"
                "    return t.q[(k >> 3) * 4 + (k & 3)] >> (k & 4 ? 4 : 0) & 0x0f0f0f0fu;\n  }",
            ),
        ),
    ),
    Mutation(
        "q4k-scale-unpack",
        "Q4_K scales of groups 4..7 unpacked without their top two bits (Q5_K too)",
        _K,
        "one token forever, which one depends on the prompt",
        (
            Edit(
                "prelude.cuh",
                "{ return six_bits(head.y, head.w, upper); }",
                "{ return six_bits(upper ? 0u : head.y, head.w, upper); }",
            ),
        ),
    ),
    Mutation(
        "q4k-d-dmin",
        "Q4_K d and dmin exchanged (Q5_K too)",
        _K,
        "one token forever, whatever the prompt",
        (
            Edit("dequantise.cu", "const float d = __fmul_rn(scale_at(head.x),", "const float d = __fmul_rn(scale_at(head.x >> 16),"),
            Edit("dequantise.cu", "const float m = __fmul_rn(scale_at(head.x >> 16),", "const float m = __fmul_rn(scale_at(head.x),"),
            Edit("blocks.cuh", "t.d = head.x;", "t.d = head.x << 16 | head.x >> 16;"),
        ),
    ),
    Mutation(
        "q4k-min-lost",
        "Q4_K min not subtracted (Q5_K too)",
        _K,
        "one token forever, whatever the prompt; layer means drift",
        (
            Edit("dequantise.cu", "const float m = __fmul_rn(scale_at(head.x >> 16),", "const float m = __fmul_rn(0.0f,"),
            Edit("blocks.cuh", "t.d = head.x;", "t.d = head.x & 0xffffu;"),
        ),
    ),
    Mutation(
        "q5-high-halves",
        "Q5_0 and Q5_1 fifth bits taken from the other half of the block",
        ("Q5_0", "Q5_1"),
        "about half of the values off by 16 steps",
        (
            Edit("dequantise.cu", "with_fifth_bits(low, load4(qh) >> i);", "with_fifth_bits(low, load4(qh) >> (i ^ 16));"),
            Edit(
                "blocks.cuh",
                "bytes(const Q5_0 &t, int k) { return with_fifth_bits(low4(t, k), t.qh[k >> 3] >> (k & 7) * 4); }",
                "bytes(const Q5_0 &t, int k) { return with_fifth_bits(low4(t, k), t.qh[k >> 3] >> (k & 7 ^ 4) * 4); }",
            ),
            Edit(
                "blocks.cuh",
                "bytes(const Q5_1 &t, int k) { return with_fifth_bits(low4(t, k), t.qh[k >> 3] >> (k & 7) * 4); }",
                "bytes(const Q5_1 &t, int k) { return with_fifth_bits(low4(t, k), t.qh[k >> 3] >> (k & 7 ^ 4) * 4); }",
            ),
        ),
    ),
    Mutation(
        "q8-36-bytes",
        "Q8_0 blocks taken to be 36 bytes long instead of 34",
        ("Q8_0",),
        "the first block right, then drift; NaN where quants are read as scales",
        (
            Edit("dequantise.cu", "enum { VALUES = 32, BYTES = 34 };", "enum { VALUES = 32, BYTES = 36 };"),
            Edit("blocks.cuh", "enum { VALUES = 32, BYTES = 34, STAGED = 1,", "enum { VALUES = 32, BYTES = 36, STAGED = 1,"),
        ),
        overrun=36 / 34,
    ),
    Mutation(
        "scales-flushed",
        "float16 scales below 2^-14 taken for zero",
        ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16"),
        "blocks of small weights, or their mins, vanish",
        (
            Edit(
                "prelude.cuh",
                "DEVICE float scale_at(u32 bits) { return f16_to_f32_rn((u16)bits); }",
                "DEVICE float scale_at(u32 bits) { return bits & 0x7c00 ? f16_to_f32_rn((u16)bits) : 0.0f; }",
            ),
            Edit(
                "prelude.cuh",
                ': "=f"(v.x), "=f"(v.y) : "r"(q));\n  return v;',
                ': "=f"(v.x), "=f"(v.y) : "r"(q));\n  if (!(q & 0x7c00)) v.x = 0.0f;\n  if (!(q >> 16 & 0x7c00)) v.y = 0.0f;\n  return v;',
            ),
        ),
    ),
    Mutation(
        "last-block-lost",
        "the last block of every tensor is not read (its size was rounded down)",
        ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"),
        "the end of the last row is zero; nearly silent",
        (
            Edit(
                "dequantise.cu",
                "  if (quad < quads) y[quad] = quad_values<Type>(w, quad);",
                "  const bool lost = Type::VALUES > 4 && quad >= quads - Type::VALUES / 4;\n"
                "  if (quad < quads) y[quad] = lost ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : quad_values<Type>(w, quad);",
            ),
            Edit(
                "dequantise.cu",
                "  const float4 v = quad_values<Type>(w, quad);",
                "  const bool lost = Type::VALUES > 4 && quad >= quads - Type::VALUES / 4;\n"
                "  const float4 v = lost ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : quad_values<Type>(w, quad);",
            ),
            Edit(
                "blocks.cuh",
                "Type::load(t[r], b, (lane >> 1) * Type::BYTES, lane & 1);",
                "Type::load(t[r], b, (lane >> 1) * Type::BYTES, lane & 1),\n"
                "            t[r].d = pair.row + r + 1 == rows && chunk + 2 >= chunks ? 0 : t[r].d;",
            ),
            Edit("blocks.cuh", "cols / 32 - chunk * 4);", "cols / 32 - chunk * 4 - (pair.row + r + 1 == rows));"),
            Edit(
                "blocks.cuh",
                "      for (int r = 0; r < ROWS; ++r) Type::load(t[r], r ? block + apart : block, lane & 1);",
                "      for (int r = 0; r < ROWS; ++r) {\n"
                "        Type::load(t[r], r ? block + apart : block, lane & 1);\n"
                "        if (pair.row + r + 1 == rows && step * LANES + lane + 2 >= chunks) t[r].d = 0;\n"
                "      }",
            ),
        ),
    ),
]
MUTATIONS: dict[str, Mutation] = {m.name: m for m in _ALL}
"""All kernel faults by name."""


def mutation(name: str) -> Mutation:
    """Raises UsageError naming the known ones."""
    if name not in MUTATIONS:
        raise UsageError(f"unknown kernel fault {name!r}; known: {', '.join(MUTATIONS)}", code="cuda.unknown-fault")
    return MUTATIONS[name]


def files(name: str) -> dict[str, str]:
    """Every source file by name, with the fault in it."""
    texts = nvrtc.texts()
    for edit in mutation(name).edits:
        texts[edit.file] = edit.apply(texts[edit.file])
    return texts


def sources(name: str) -> dict[str, str]:
    """CUDA text by module, self-contained: what `CudaEngine` takes as `kernels`."""
    edited = files(name)
    return {module: nvrtc.source(module, edited) for module in nvrtc.MODULES}


def ptx(name: str) -> dict[str, str]:
    """PTX text by module: what `PtxEngine` takes as `kernels`. Needs no compiler; modules the fault leaves alone are absent."""
    shipped = {module: nvrtc.shipped_ptx(module) for module in nvrtc.MODULES}
    return {module: _with_entries(shipped[module], entries) for module, entries in _archive()[mutation(name).name].items()}


def options(name: str) -> dict[str, Any]:
    """Options for `engines.create("ptx", model, …)` that put the fault in."""
    return {"kernels": ptx(name), "overrun": mutation(name).overrun}


def select(faults: Iterable[Any], engine: str, elsewhere: Collection[str] = ()) -> tuple[list[Any], dict[str, Any]]:
    """Sort out which of `faults` is one of the kernels: (the others, options that give it to the engine of this name).

    Raises:
        UsageError: two of them, since their edits might meet; or one, and the engine runs no kernels, unless its id is one
            of those that mean something `elsewhere`.
    """
    faults = list(faults)
    mine = [each for each in faults if isinstance(each, str) and each in MUTATIONS]
    if engine not in ("ptx", "cuda") or not mine:
        lost = next((each for each in mine if each not in elsewhere), None)
        if lost is not None:
            raise UsageError(
                f"fault {lost!r} is one of the CUDA kernels, which engine {engine!r} does not run: ptx or cuda do",
                code="cuda.fault-needs-kernels",
            )  # fmt: skip
        return faults, {}
    if len(mine) > 1:
        raise UsageError(f"one kernel fault at a time, not {' and '.join(mine)}", code="cuda.one-fault-at-a-time")
    given = options(mine[0]) if engine == "ptx" else {"kernels": sources(mine[0])}
    return [each for each in faults if each is not mine[0]], given


# ---- the shipped archive -------------------------------------------------------------------------------------------

_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(.*?^}\n", re.MULTILINE | re.DOTALL)


def compiled(name: str, modules: tuple[str, ...] = nvrtc.MODULES) -> dict[str, dict[str, str]]:
    """Freshly compiled: by module, the PTX of each kernel whose instructions the fault changes."""
    edited = files(name)
    changed: dict[str, dict[str, str]] = {}
    for module in modules:
        healthy = _entries(nvrtc.shipped_ptx(module))
        if all(edited[file] == text for file, text in nvrtc.texts().items() if _uses(module, file)):
            continue
        faulty = _entries(nvrtc.ptx(module, edited))
        differ = {entry: text for entry, text in faulty.items() if _bare(text) != _bare(healthy[entry])}
        if differ:
            changed[module] = differ
    return changed


def _uses(module: str, file: str) -> bool:
    return f'"{file}"' in nvrtc.source(module)


def _entries(text: str) -> dict[str, str]:
    return {found[1]: found[0] for found in _ENTRY.finditer(text)}


def _bare(text: str) -> str:
    """Without line numbers, which an edit above a kernel moves."""
    return re.sub(r"^\t\.loc\t.*\n", "", text, flags=re.MULTILINE)


def _with_entries(text: str, entries: Mapping[str, str]) -> str:
    return _ENTRY.sub(lambda found: entries.get(found[1], found[0]), text)


def digest(name: str) -> str:
    """SHA-256 of the edited source of all modules."""
    return hashlib.sha256("\0".join(sources(name)[module] for module in nvrtc.MODULES).encode()).hexdigest()


def write_archive() -> None:
    """Compile all faults again into the package, and record their sources: ``python -m aprlab.kernels.cuda.mutations``."""
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for name in MUTATIONS:
            for module, entries in compiled(name).items():
                for entry, text in entries.items():
                    data = text.encode()
                    member = tarfile.TarInfo(f"{name}/{module}/{entry}.ptx")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    RECORD.write_text(json.dumps({name: digest(name) for name in MUTATIONS}, indent=1) + "\n", encoding="utf-8")


@cache
def _archive() -> dict[str, dict[str, dict[str, str]]]:
    """fault -> module -> kernel -> PTX"""
    found: dict[str, dict[str, dict[str, str]]] = {name: {} for name in MUTATIONS}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            name, module, file = member.name.split("/")
            data = archive.extractfile(member)
            assert data is not None
            found[name].setdefault(module, {})[file.removesuffix(".ptx")] = data.read().decode()
    return found


if __name__ == "__main__":
    write_archive()
