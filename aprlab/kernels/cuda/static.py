"""What must hold of compiled kernels before any of them runs: gates over PTX text and the assembler's report."""

from __future__ import annotations

import re

from aprlab.kernels.cuda.compile import Compiled
from aprlab.kernels.cuda.launch import KERNELS

MATVEC_REGISTERS = 128
"""Registers a thread of a mat-vec kernel may take; sixteen warps then fit on a multiprocessor."""
OTHER_REGISTERS = 64
WIDE_LOADS = ("matvec_q4_k", "matvec_q4_k_q8", "matvec_q5_k", "matvec_q5_k_q8", "matvec_f16", "matvec_bf16")
"""Kernels that read weights from global memory in 16-byte pieces, as their blocks allow."""
STAGED = tuple(f"matvec_{name}{q8}" for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q6_k") for q8 in ("", "_q8"))
"""Kernels whose blocks start at even addresses only: 16-byte pieces go through shared memory."""

_WEIGHTS = re.compile(r"\bld\.global(?:\.nc)?\.v4\.[ub]32\b")
_ACTIVATIONS = re.compile(r"\bld\.global(?:\.nc)?\.v4\.f32\b")
_STAGING = re.compile(r"\bst\.shared\.v4\.[ub]32\b")
_DP4A = re.compile(r"\bdp4a\.s32\.s32\b")
_PLAIN_FLOAT = re.compile(r"^\s*(?:@!?%p\d+\s+)?((?:add|sub|mul)(?:\.ftz)?(?:\.sat)?\.f32)\b.*", re.MULTILINE)
_INEXACT = re.compile(r"^\s*(?:@!?%p\d+\s+)?(\w+\.approx[.\w]*|fma\.\w+\.ftz[.\w]*|div\.full[.\w]*)\b.*", re.MULTILINE)
_LOCAL = re.compile(r"\b(?:ld|st)\.local\b|^\s*\.local\b", re.MULTILINE)
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(.*?^}\n", re.MULTILINE | re.DOTALL)


def findings(compiled: Compiled) -> list[str]:
    """What is wrong with one compiled module, a line each; empty if nothing is.

    Gates: known kernels only; no spills, no stack, no local memory; registers within bounds; 16-byte loads and dp4a where
    they are promised; no float addition or multiplication whose rounding PTX leaves open to fusing; no approximations.
    """
    found = []
    for entry, text in entries(compiled.ptx).items():
        found += [f"{entry}: {line}" for line in _of_entry(entry, text)]
        if compiled.resources:
            if entry not in compiled.resources:
                found.append(f"{entry}: the assembler does not report it")
                continue
            used = compiled.resources[entry]
            most = MATVEC_REGISTERS if entry.startswith("matvec_") else OTHER_REGISTERS
            if used.registers > most:
                found.append(f"{entry}: {used.registers} registers, at most {most}")
            if used.stack or used.spill_loads or used.spill_stores:
                found.append(f"{entry}: {used.stack} bytes of stack, {used.spill_stores} + {used.spill_loads} spilled")
    return found


def entries(ptx: str) -> dict[str, str]:
    """Text of each kernel by name."""
    return {match[1]: match[0] for match in _ENTRY.finditer(ptx)}


def _of_entry(entry: str, text: str) -> list[str]:
    found = []
    if entry not in KERNELS:
        found.append("not in the launch table")
    found += [f"rounding left open: {match[0].strip()}" for match in _PLAIN_FLOAT.finditer(text)]
    found += [f"approximate: {match[0].strip()}" for match in _INEXACT.finditer(text)]
    if _LOCAL.search(text):
        found.append("uses local memory")
    if entry in WIDE_LOADS and not _WEIGHTS.search(text):
        found.append("no 16-byte loads of weights")
    if entry in STAGED and not (_WEIGHTS.search(text) and _STAGING.search(text)):
        found.append("weights do not go through shared memory in 16-byte pieces")
    if entry.startswith("matvec_") and not entry.endswith(("_q8", "_f32")) and not _ACTIVATIONS.search(text):
        found.append("no 16-byte loads of activations")
    if entry.endswith("_q8") and not _DP4A.search(text):
        found.append("no dp4a")
    if not entry.endswith("_q8") and _DP4A.search(text):
        found.append("dp4a in a kernel of contract f32")
    return found
