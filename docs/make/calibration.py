"""How far the posterior of forensics can be believed: `python docs/make/calibration.py` measures it on made answers.

Answers of faults of the catalogue (greedy, and sampled at temperature 0.7), the same with that fault left out of the catalogue,
answers of the healthy model, and random words. The record is data/calibration.json, the table goes into docs/evidence.md;
`--page` writes the table alone, `--model FILE` measures another model, `--fit` prints the constants of
`aprlab/forensics/posterior.py` that fit best.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import paths
from aprlab.errors import AprlabError
from aprlab.faults import run_faults, session_with
from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.bench import FaultBench, Question
from aprlab.forensics.outcome import Forensics
from aprlab.forensics.posterior import MEASURED, Calibration, Posterior, posterior
from aprlab.forensics.search import search
from aprlab.formats import open_model
from aprlab.formats.writing import write_json, write_text
from aprlab.inference.sampling import Sampling
from aprlab.inference.session import Session

RECORD = paths.data_dir() / "calibration.json"
PAGE = Path(__file__).resolve().parents[1] / "evidence.md"
BEGIN, END = "<!-- calibration: made by docs/make/calibration.py -->", "<!-- end of calibration -->"
PROMPTS = ("What is 2+2?", "What is the capital of France?", "What is 9-4?")
LENGTH = 8  # tokens of a text
RANDOM = 8  # texts of random words for each prompt
PARTS = 5  # of the texts; each is judged by constants that were fitted on the other four
KINDS = {
    "fault": "a fault of the catalogue", "sampled": "the same at temperature 0.7",
    "left out": "its fault left out of the catalogue", "healthy": "the healthy model, greedy and at 0.7",
    "random": "random words",
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """One made text: what made it, and the bench's question about it."""

    kind: str
    truth: str
    question: Question


def made_texts(session: Session, prompts: list[str], faults: list[str]) -> Iterator[Made]:
    """Answers of faults and of the healthy model, and random words; only what differs from the healthy answer."""
    rng = np.random.default_rng(17)
    words = [id for id, kind in enumerate(session.tokenizer.data.token_types) if kind == 1]
    for n, prompt in enumerate(prompts):
        def asked(kind: str, truth: str, text: str, n: int = n, prompt: str = prompt, times: int = 0) -> Made:
            question = Question(f"{kind} {truth} {n} {times}", prompt, text, "file", None, LENGTH + 4)
            return Made(kind, truth, question)

        healthy = session.generate(prompt, max_tokens=LENGTH).text
        warm = session.generate(prompt, max_tokens=LENGTH, sampling=Sampling(0.7, 1.0, n)).text
        yield asked("healthy", "healthy", healthy)
        yield asked("healthy", "healthy", warm, times=1)
        for times in range(RANDOM):
            yield asked("random", "none", session.tokenizer.decode(rng.choice(words, LENGTH)), times=times)
        for id in faults:
            try:
                broken = session_with(session, [id])
                text = broken.generate(prompt, max_tokens=LENGTH).text
                other = broken.generate(prompt, max_tokens=LENGTH, sampling=Sampling(0.7, 1.0, n)).text
            except AprlabError:
                continue
            if text.strip() and text != healthy:
                yield asked("fault", id, text)
            if n == 0 and other.strip() and other not in (healthy, warm, text):
                yield asked("sampled", id, other)


@dataclass(frozen=True)
class Judged:
    """A text with what every set makes of it."""

    made: Made
    found: Forensics


def judged(session: Session, made: list[Made], faults: list[str], journal: str | None) -> list[Judged]:
    """Every fault on every text."""
    found = search(
        FaultBench(session, [each.question for each in made]), faults, journal=journal,
        progress=lambda chosen, found: print(*chosen, f"{time.process_time():.0f} s", file=sys.stderr),
    )  # fmt: skip
    return [Judged(each, found[each.question.id]) for each in made]


@dataclass(frozen=True)
class View:
    """A text as it is asked about: with its fault in the catalogue, or without.

    Attributes:
        kind: of `KINDS`.
        suspects: the sets that are in the catalogue.
        level: those that are as true as the fault: itself, and others under which the text is as likely (half a bit a token).
        shown: whether the fault, healthy or one that is level is among them; otherwise it is none of these.
    """

    kind: str
    of: Judged
    suspects: list[Suspect]
    level: frozenset[tuple[str, ...]]

    @property
    def shown(self) -> bool:
        return bool(self.level) or self.of.made.truth == "healthy"

    def believed(self, calibration: Calibration) -> tuple[Posterior, float, bool]:
        """(the posterior, the chance that it gives to the truth, whether its answer is true)."""
        found = posterior(self.of.found.null_bits, self.of.found.healthy, self.suspects, calibration)
        if self.of.made.truth == "healthy":
            return found, found.healthy, found.answer == "healthy"
        if not self.level:
            return found, found.none, found.answer == "none"
        chance = sum(chance for faults, chance in found.sets if faults in self.level)
        return found, chance, found.answer == "fault" and found.sets[0][0] in self.level


def views(all_judged: list[Judged]) -> list[View]:
    """Each text; greedy answers of faults a second time, with the fault left out."""
    found = []
    for each in all_judged:
        truth = (each.made.truth,)
        mine = next((s.bits for s in each.found.suspects if s.faults == truth), None)
        near = {s.faults for s in each.found.suspects
                if mine is not None and s.bits is not None and s.bits <= mine + LENGTH / 2}  # fmt: skip
        found.append(View(each.made.kind, each, each.found.suspects, frozenset(near)))
        if each.made.kind == "fault":
            others = [s for s in each.found.suspects if s.faults != truth]
            found.append(View("left out", each, others, frozenset(near - {truth})))
    return found


def fitted(asked: list[View]) -> Calibration:
    """The constants that make the truth least surprising, each kind of text weighing the same."""
    count = Counter(view.kind for view in asked)
    rows, right, weights = [], [], []
    for view in asked:
        bits = [s.bits for s in view.suspects if s.bits is not None]
        null, best = view.of.found.null_bits, min([*bits, view.of.found.healthy.bits or 0.0])
        rows.append([1.0, -min(2.0, best / null), np.log2(1 + max(0.0, null - best))])
        right.append(float(view.shown))
        weights.append(1 / count[view.kind])
    x, y, w = np.array(rows), np.array(right), np.array(weights)
    w = np.where(y == 1, w / w[y == 1].sum(), w / w[y == 0].sum())  # even priors
    even, left, saved = logistic(x, y, w)

    def surprise(discount: float) -> float:
        tried = Calibration(even, left, saved, discount)
        return float(np.mean([-np.log2(max(view.believed(tried)[1], 1e-6)) / count[view.kind] for view in asked]))

    return Calibration(even, left, saved, min((0.1, 0.2, 0.3, 0.5, 0.7, 1.0), key=surprise))


def logistic(x: np.ndarray, y: np.ndarray, w: np.ndarray, ridge: float = 1e-3) -> list[float]:
    """Weighted logistic regression by Newton's method: rows `x`, whether each is right, weights; the coefficients."""
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
        step = np.linalg.solve((x.T * (w * p * (1 - p))) @ x + ridge * np.eye(len(beta)), x.T @ (w * (y - p)) - ridge * beta)
        beta += step
        if np.abs(step).max() < 1e-6:
            break
    return [round(float(each), 2) for each in beta]


def held_out(asked: list[View]) -> list[Calibration]:
    """For each text, the constants that were fitted on the others: without all texts of its fault, in `PARTS` parts."""
    faults = list(dict.fromkeys(view.of.made.truth for view in asked if view.kind == "fault"))
    part = [faults.index(view.of.made.truth) if view.of.made.truth in faults else n for n, view in enumerate(asked)]
    constants = [fitted([view for view, p in zip(asked, part, strict=True) if p % PARTS != out]) for out in range(PARTS)]
    return [constants[p % PARTS] for p in part]


def measured(
    name: str, asked: list[View], faults: int, calibration: Calibration, others: list[Calibration] | None
) -> dict[str, Any]:
    """What goes into the record; `others` are constants in which a text had no part."""
    rows: dict[str, Any] = {}
    sure: list[tuple[float, bool]] = []
    for n, view in enumerate(asked):
        found, chance, right = view.believed(calibration)
        row = rows.setdefault(view.kind, {"texts": 0, "right": 0, "chance": 0.0, "claimed": 0})
        row["texts"] += 1
        row["right"] += right
        if others is not None:
            row["held_out"] = row.get("held_out", 0) + view.believed(others[n])[2]
        row["chance"] += chance
        row["claimed"] += found.answer in ("fault", "compound")
        sure.append((max(found.healthy, found.fault + found.compound, found.none), right))
    for row in rows.values():
        row["chance"] = round(row["chance"] / row["texts"], 3)
    bins = {}
    for low, high in ((0.0, 0.6), (0.6, 0.8), (0.8, 0.95), (0.95, 1.01)):
        inside = [(p, right) for p, right in sure if low <= p < high]
        if inside:
            bins[f"{low:g}–{min(high, 1):g}"] = [len(inside), round(float(np.mean([p for p, _ in inside])), 3),
                                                round(float(np.mean([right for _, right in inside])), 3)]  # fmt: skip
    return {"model": name, "faults": faults, "constants": asdict(calibration), "kinds": rows, "bins": bins}


def table(record: dict[str, Any]) -> str:
    """The tables of the page."""
    lines = []
    for of in record.values():
        constants = ", ".join(f"{name} {value:g}" for name, value in of["constants"].items())
        lines += [f"**{of['model']}**, {of['faults']} faults, {sum(row['texts'] for row in of['kinds'].values())} texts, "
                  f"{constants}:", "",
                  "| text | how many | answered right | held out | chance given to the truth | a fault was named |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for kind, row in of["kinds"].items():
            share = f"{row['right']} ({row['right'] / row['texts']:.0%})"
            without = row.get("held_out", "all of them")
            lines.append(f"| {KINDS[kind]} | {row['texts']} | {share} | {without} | {row['chance']:.2f} | {row['claimed']} |")
        lines += ["", "| it was sure to | times | on average | and was right in |", "|---|---|---|---|"]
        lines += [f"| {name} | {count} | {mean:.2f} | {share:.0%} |" for name, (count, mean, share) in of["bins"].items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def write_page(record: dict[str, Any]) -> None:
    """Put the tables into docs/evidence.md."""
    text = PAGE.read_text(encoding="utf-8")
    new, count = re.subn(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{table(record)}\n{END}", text, flags=re.DOTALL
    )
    assert count == 1, f"{PAGE} has no place for the table"
    write_text(PAGE, new)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--model", type=Path, default=paths.embedded_model())
    parser.add_argument("--engine", default="reference")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--journal", help="keeps what was judged, see `aprlab forensics --resume`")
    parser.add_argument("--every", type=int, default=1, help="make answers of each N-th fault only")
    given = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if not given.page:
        session = Session(open_model(given.model), engine=given.engine)
        faults = [id for id, fault in run_faults().items() if not fault.silent]
        made = list(made_texts(session, list(PROMPTS[: given.prompts]), faults[:: given.every]))
        asked = views(judged(session, made, faults, given.journal))
        ran = len({s.faults for view in asked for s in view.suspects if s.bits is not None})
        if given.fit:
            print(fitted(asked))
        others = held_out(asked) if given.model == paths.embedded_model() else None  # the constants are of its texts
        record[given.model.stem] = measured(given.model.stem, asked, ran, MEASURED, others)
        write_json(RECORD, record)
    write_page(record)


if __name__ == "__main__":
    main()
