"""Record what a model says under each fault, and make `docs/signatures.md` from the record.

    python docs/make/signatures.py record MODEL.gguf data/signatures.json --name "0.5B" [--follow] [--prompt P ...]
    python docs/make/signatures.py page data/signatures.json docs/signatures.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from pathlib import Path
from typing import Any

from aprlab.forensics.signatures import PROMPTS, Signatures, fault_signatures
from aprlab.formats.writing import write_json, write_text

HEAD = """\
# Signatures

Every fault has its own signature. This page shows what a model says under each fault that a run can have, one fault at a
time, everything else healthy: greedy, through the model's own chat template, activations in float32. It is made from
`data/signatures.json` by `python docs/make/signatures.py page data/signatures.json docs/signatures.md`; each model's part
of that file by the command under its heading.

**Recognised** says how specific a signature is: `forensics` gets one answer under a fault and has to find that fault among
all of them, by what they say to *another* prompt. Faults that do not change the given answer are not counted, because a text
cannot show them. Two faults with identical answers share a rank. `forensics` combines the answers and the likelihood of
the text itself; the likelihood needs a forward pass for each pair of faults, and was measured on the embedded model only.

**Silent** faults do not change a word of any answer here. No gate on text can detect them, whatever it compares; the gate on
logits does (`A-LOGITS` in [kill-matrix.md](kill-matrix.md)). The bits are the largest change in the distribution of a next
token while the answer was still the healthy one; 0 means less than a millionth.
"""


def _cell(text: str) -> str:
    """Text as it is, in code marks, on one line; bars would end the table's cell."""
    shown = repr(text)[1:-1].replace("|", "\\|").replace("`", "ˋ")
    return f"`{shown}`" if shown else "*(ends at once)*"


def page(record: dict[str, Any]) -> str:
    """The whole of `docs/signatures.md`."""
    head = (
        "model",
        "questions",
        "faults",
        "silent",
        "cases",
        "recognised, first",
        "among three",
        "by answers alone",
        "among three",
    )
    parts = [HEAD, "## In short\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    recorded = {name: Signatures.from_json(entry) for name, entry in record["models"].items()}
    for name, v in recorded.items():
        both = f"{v.top1:.0%} | {v.top3:.0%}" if v.followed else "– | –"
        alone = " | ".join(f"{share:.0%}" for share in v.alone)
        parts.append(f"| {name} | {len(v.prompts)} | {len(v.said)} | {len(v.silent)} | {v.counted} | {both} | {alone} |")
    parts.append(f"\n{record['note']}\n" if record.get("note") else "")
    for name, v in recorded.items():
        entry = record["models"][name]
        parts.append(f"## {name}\n\n`{entry['command']}`, {entry['date']}, engine {entry['engine']}.\n")
        parts.append(f"Silent: {', '.join(f'`{id}` ({_bits(v.moved[id])})' for id in v.silent) or 'none'}.\n")
        parts.append(f"| fault | {' | '.join(v.prompts)} | moved | recognised |")
        parts.append("|---|" + "---|" * (len(v.prompts) + 2))
        parts.append(f"| *healthy* | {' | '.join(map(_cell, v.healthy))} | | |")
        for id, texts in v.said.items():
            known = v.known.get(id)
            again = "silent" if id in v.silent else ""
            if known is not None and known.counted:
                again = f"{known.first} of {known.counted}" + (f", else `{known.instead}`" if known.instead else "")
            parts.append(f"| `{id}` | {' | '.join(map(_cell, texts))} | {_bits(v.moved[id])} | {again} |")
        if v.why_not:
            parts.append(f"\nCannot run with this model: {', '.join(f'`{id}`' for id in v.why_not)}.\n")
    return "\n".join(parts).rstrip() + "\n"


def _bits(bits: float) -> str:
    if not math.isfinite(bits):
        return "not a number"
    return "0" if bits == 0 else f"{bits:.{0 if bits >= 10 else 1}f} bits" if bits >= 1 else f"{bits:.1g} bits"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python docs/make/signatures.py")
    verbs = parser.add_subparsers(dest="verb", required=True)
    record = verbs.add_parser("record")
    record.add_argument("model", type=Path)
    record.add_argument("output", type=Path)
    record.add_argument("--name", required=True, help="heading of this part")
    record.add_argument("--prompt", action="append", help="ask this; twice or more")
    record.add_argument("--max-tokens", type=int, default=12)
    record.add_argument("--follow", action="store_true")
    record.add_argument("--engine", default="jit")
    record.add_argument("--threads", type=int, default=None)
    made = verbs.add_parser("page")
    made.add_argument("record", type=Path)
    made.add_argument("output", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.verb == "page":
        write_text(chosen.output, page(json.loads(chosen.record.read_text(encoding="utf-8"))))
        return
    started = time.process_time()
    heard = fault_signatures(
        chosen.model, chosen.prompt or PROMPTS, max_tokens=chosen.max_tokens, follow=chosen.follow, engine=chosen.engine,
        threads=chosen.threads, progress=lambda id: print(id, round(time.process_time() - started), flush=True),
    )  # fmt: skip
    asked = "".join(f" --prompt {json.dumps(p)}" for p in chosen.prompt or ())
    command = f"python docs/make/signatures.py record {chosen.model.name} data/signatures.json"
    command += f" --name {json.dumps(chosen.name)} --engine {chosen.engine}"
    command += f" --max-tokens {chosen.max_tokens}{' --follow' if chosen.follow else ''}{asked}"
    known: dict[str, Any] = {"note": "", "models": {}}
    if chosen.output.exists():
        known = json.loads(chosen.output.read_text(encoding="utf-8"))
    known["models"][chosen.name] = {
        "command": command, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "engine": chosen.engine,
        "seconds": round(time.process_time() - started, 1), **heard.to_json(),
    }  # fmt: skip
    write_json(chosen.output, known)
    print(f"first {heard.top1:.0%}, among three {heard.top3:.0%}, of {heard.counted}; silent: {', '.join(heard.silent)}")


if __name__ == "__main__":
    main()
