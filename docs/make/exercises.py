"""Write the notebooks of `notebooks/exercises`, without outputs: `python docs/make/exercises.py`.

`python docs/make/exercises.py verify` makes every patient that any seed can make, and says how many of them peel names
(two minutes of processor time).
"""

from __future__ import annotations

import sys
import tempfile

import nbformat

from aprlab import paths
from aprlab.lab import exercises

FOLDER = paths.notebooks_dir() / "exercises"
PARAMETERS = """\
seed: int = 1  # another seed may be another fault
answer: str = ""  # your answer: the id of a fault, as `aprlab faults` lists them
reveal: bool = False  # whether the solution is shown at the end
out: str = ""  # folder for the findings; empty: do not write any
model: str = ""  # not used: patients are made from the embedded model"""
START = """\
import tempfile

from aprlab import {imports}
from aprlab.lab import exercises

work = tempfile.TemporaryDirectory(prefix="aprlab-")
patient = exercises.exercise({number}, seed, folder=work.name)
for question in exercises.QUESTIONS:
    print(question, patient.ask(question))"""
END = """\
outcome = patient.check(answer)
checks = {{"the answer, if there is one, is right": outcome.right is not False}}
lab.write_findings("{name}", {{"answer": answer, "right": outcome.right, "checks": checks}}, out)
work.cleanup()
assert outcome.right is not False, outcome.words"""
HEAD = """\
# Exercise {number}: {title}

{story}

The fault is chosen by the seed when the first cell runs; it is not written anywhere here.

---
{links}"""
TRY = "## Look\n\n{look}"
ANSWER = """\
## Answer

Put the id of a fault into `answer` above (or into the call below) and run again. Hints open one inside the other. With
`reveal = True` the last cell shows what `peel` finds, with the proof."""
# name, title, story, what to look at, code to begin with
EXERCISES = (
    (
        "1_two_files",
        "two files",
        """\
Somebody converted the model. The file has every tensor, and every type is right. It loads, or a loader complains about
something that makes no sense. You have the original too.""",
        """\
Tensors of both files, side by side. One with the values of another has the wrong name; one whose values are nowhere has lost
them.""",
        """\
import aprlab

a = aprlab.open_model(patient.pair.reference)
b = aprlab.open_model(patient.pair.candidate)
for row in aprlab.compare(a, b).differing()[:6]:
    print(row["what"], row["finding"], row["a"], row["b"])""",
    ),
    (
        "2_blocks",
        "in the blocks",
        "Names, types and shapes of both files are the same. The bytes of some tensors are not.",
        """\
Values of one tensor in both files. Where they lie tells what was done to the blocks: on a line of another slope, on two lines,
everywhere. Then look at single blocks: `widgets.block_microscope(patient.pair.reference, patient.pair.candidate)`.""",
        """\
import aprlab

name = "blk.0.ffn_gate.weight"
sides = [aprlab.open_model(path) for path in (patient.pair.reference, patient.pair.candidate)]
values = [side.tensors[name].dequantise().ravel() for side in sides]
with figures.style():
    figures.value_scatter(*values, ("reference", "candidate")).set_title(name)""",
    ),
    (
        "3_one_file",
        "one file alone",
        "The original is lost. All that is left is the broken file, and what is known of healthy ones.",
        """\
Marks that every encoder leaves in its blocks: light is what a healthy file may have. Where all marks are as they should be,
the blocks are sound and something around them is not: which tensor has which values?""",
        """\
import aprlab
from aprlab.lab import finding_figures

model = aprlab.open_model(patient.pair.candidate)
with figures.style():
    finding_figures.of_marks(list(model.tensors.values()))""",
    ),
    (
        "4_a_program",
        "a program",
        "The file is healthy, byte for byte. Two programs run it, and one of them talks nonsense.",
        "Each step of the second program, computed on the inputs that the first one had: what differs was introduced there.",
        """\
from aprlab.onion.verdict import Verdict
from aprlab.tracing import comparisons
from aprlab.tracing.traces import replay, trace

sides = patient.pair.sessions(Verdict("broken", []))
sound = trace(sides["reference"], exercises.QUESTIONS[0])
steps, alone = comparisons.layer_errors(sound, replay(sides["candidate"], sound))
with figures.style():
    figures.error_map(alone, range(len(alone)), steps, xlabel="step")""",
    ),
    (
        "5_a_sentence",
        "a sentence",
        "No file, no program: only two answers from a bug report, and a healthy copy of the model.",
        """\
Which faults would make the healthy model say this? `forensics` tries them; without `faults=` it tries all of them, which takes
a minute.""",
        """\
import aprlab
from aprlab.forensics.ranking import forensics

model = aprlab.open_model(aprlab.embedded_model())
saw = patient.ask(exercises.QUESTIONS[0])["candidate"]
forensics(model, saw, faults=["lost-v-biases", "tied-lm-head"])""",
    ),
)


def notebook(n: int) -> nbformat.NotebookNode:
    """The notebook of exercise ``n + 1``."""
    name, title, story, look, code = EXERCISES[n]
    before = [f"before: [{EXERCISES[n - 1][1]}]({EXERCISES[n - 1][0]}.ipynb)"] if n else []
    after = [f"next: [{EXERCISES[n + 1][1]}]({EXERCISES[n + 1][0]}.ipynb)"] if n + 1 < len(EXERCISES) else []
    links = " · ".join(["[Start](../index.ipynb)", *before, *after])
    text, cell = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [
        text(HEAD.format(number=n + 1, title=title, story=story, links=links)),
        cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        cell(START.format(number=n + 1, imports="figures, lab" if "figures." in code else "lab")),
        text(TRY.format(look=look)),
        cell(code),
        text(ANSWER),
        cell("patient.hints"),
        cell("patient.check(answer)"),
        cell('patient.peel() if reveal else "not yet"'),
        cell(END.format(name=name)),
    ]
    for place, each in enumerate(cells):
        each["id"] = f"exercise-{n + 1}-{place}"
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def verify() -> None:
    """Every patient of every pool: whether peel names it."""
    for number in exercises.FORMS:
        named = 0
        pool = exercises.pool(number)
        for fault in pool:
            seed = next(seed for seed in range(1000) if exercises.chosen(number, seed) is fault)
            with tempfile.TemporaryDirectory() as folder:
                patient = exercises.exercise(number, seed, folder=folder)
                named += fault.id in patient.pair.named(patient.peel())
        print(f"{number}: {named} of {len(pool)} patients named by peel")


if __name__ == "__main__":
    if sys.argv[1:] == ["verify"]:
        verify()
    else:
        FOLDER.mkdir(exist_ok=True)
        for n, row in enumerate(EXERCISES):
            nbformat.write(notebook(n), FOLDER / f"{row[0]}.ipynb")
