"""Make `docs/faults.md`, the catalogue in words: `python docs/make/faults_page.py docs/faults.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from aprlab.faults import FAULTS
from aprlab.faults.base import SECTIONS
from aprlab.faults.catalogue import forms
from aprlab.formats.writing import write_text

_HEAD = """\
# The fault catalogue

Every known way in which the conversion from GGUF to APR went wrong upstream. Each fault can be switched on by its id:

    aprlab convert model.gguf -o broken.apr --fault GH-191,GH-190
    aprlab run model.gguf -p "What is 2+2?" --fault lost-qkv-biases
    aprlab faults GH-202

A fault enters where the historical bug was: in a decision of the converter (*file*), in a block decoder (*decoder*), in a
primitive of an engine (*engine*), in the hyperparameters (*config*), in the tokenizer, in the generation loop
(*loop*), or in a measurement (*instrument*). A bug that can be in a file as well as in a reader has both forms.
*Silent* means that a short greedy answer of a real model stays correct, word for word: only logits, files or long
contexts show the fault.

This page is generated from the code (`python docs/make/faults_page.py docs/faults.md`).
"""


def markdown() -> str:
    """The whole of `docs/faults.md`."""
    parts = [_HEAD]
    for letter, title in SECTIONS.items():
        chosen = [fault for fault in FAULTS.values() if fault.section == letter]
        parts += [f"\n## {letter}. {title}\n", "| id | layer | enters | silent | title |", "|---|---|---|---|---|"]
        for f in chosen:
            parts.append(f"| [`{f.id}`](#{f.id.lower()}) | {f.layer} | {forms(f)} | {'yes' if f.silent else ''} | {f.title} |")
        for fault in chosen:
            parts.append(f"\n### {fault.id}\n\n**{fault.title}.** {' '.join(fault.story.splitlines())}\n\nMark: {fault.mark}")
            if fault.needs:
                given = " ".join(f"--{key} {value}" for key, value in fault.given.items())
                parts.append(f"\nNeeds {fault.needs}{f' (`convert {given}`)' if given else ''}.")
    parts.append(f"\n{len(FAULTS)} faults.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), markdown())
