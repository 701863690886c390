"""The terms of a playbook: areas, formats, ways to ask and things to do."""

from __future__ import annotations

AREAS: dict[str, str] = {
    "QUAL": "quality of answers", "PERF": "speed and memory", "STAB": "stability", "COMP": "conversions",
    "EDGE": "edge cases", "REGR": "known bugs",
}  # fmt: skip
FORMATS = ("gguf", "apr", "safetensors")
ASKS = ("ask", "complete", "talk")  # a user's message, raw text, a conversation
DOINGS = ("load", "serial", "speed", "memory", "convert", "gate")
