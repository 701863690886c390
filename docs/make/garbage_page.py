"""Make `docs/garbage.md`, how often the garbage detector is right: `python docs/make/garbage_page.py docs/garbage.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aprlab.faults.instruments import words_for_garbage
from aprlab.formats.writing import write_text
from aprlab.instruments.garbage_detector import LONG, PARTS, SURPRISED, Labelled, confusion, is_garbage, labelled


def markdown(items: Iterable[Labelled] | None = None) -> str:
    """`docs/garbage.md`: the confusion tables, by part and by source, and what is judged wrongly."""
    known = list(items) if items is not None else labelled()
    rows: list[str] = []
    judges: dict[str, Any] = {"is_garbage": lambda text: is_garbage(text)[0], "upstream's words": words_for_garbage}
    for part, least in [(part, least) for part in PARTS for least in (0, LONG)]:
        chosen = [i for i in known if i.part == part and len(i.text) >= least]
        for name, judge in judges.items():
            c = confusion(chosen, judge)
            bad, good = c["caught"] + c["missed"], c["accepted"] + c["accused"]
            shares = f"{c['caught'] / max(bad, 1):.1%} | {c['accused'] / max(good, 1):.1%}"
            title = f"{part}, {least} characters and more" if least else part
            cells = (title, name, bad, c["caught"], c["missed"], good, c["accepted"], c["accused"], shares)
            rows.append(f"| {' | '.join(map(str, cells))} |")
    sources: dict[str, list[Labelled]] = {}
    for item in known:
        sources.setdefault(item.source.split(":")[0], []).append(item)
    table = [
        f"| {s} | {len(g)} | {sum(i.garbage for i in g)} | {confusion(g)['missed']} | {confusion(g)['accused']} |"
        for s, g in sorted(sources.items())
    ]
    wrong = [
        f"| {item.part} | {'missed' if item.garbage else 'accused'} | {item.source} | `{_cell(item.text)}` |"
        for item in known
        if is_garbage(item.text)[0] != item.garbage
    ]
    parts = {"rows": rows, "sources": table, "wrong": wrong or ["| | none | | |"]}
    return _PAGE.format(count=len(known), limit=SURPRISED, **{name: "\n".join(lines) for name, lines in parts.items()})


def _cell(text: str) -> str:
    return json.dumps(text[:80], ensure_ascii=False).replace("|", "\\|").replace("`", "'")


_PAGE = """\
# The garbage detector, measured

`aprlab.instruments.garbage_detector.is_garbage(text)` judges the text alone. It is measured on {count} labelled texts,
`data/garbage.jsonl`: the outputs quoted in the ticket and in upstream's bug reports; what the embedded model and
Qwen2.5-Coder 0.5B and 1.5B say with faults of the catalogue switched on; healthy answers; and texts written for the
purpose (numbers, words such as "information", Chinese, Japanese and other languages, code, haiku, lists). The label says
whether a reader would accept the text as an answer in form; a wrong but well-formed answer is not garbage.

All labels come from one reader. The rules were fitted to errors in the *tuning* part only. The *held-out* part is a third
of the texts, chosen by hash, plus all outputs of the current embedded model, which was trained after the first rules were
written; no rule was changed because of an error there. But its errors have been on this page ever since, so it is no longer
pristine. The *fresh* part is: 65 outputs of Qwen2.5-Coder-1.5B under faults and sets of faults, and two answers of
the healthy 0.5B. They were labelled by hand after the last change of a rule; by hand, because a model with a fault may still
give a well-formed answer ("2+2 equals").

Most misses are a few letters that could be a word ("Bluenight", "A model leam."): a model with a small vocabulary produces
well-formed text of that kind even when it is broken, and the text alone cannot show it. So no verdict rests on this
detector: it is one gate of many, and the gates on logits detect those cases.

If a healthy session of the same model is available, `is_garbage(text, sound, prompt)` also asks how surprised that model
would be (mean -log p of the tokens; limit {limit:g} nats, from the tuning part). On the outputs of the embedded model that
caught 77 of 85 in the held-out part; of the 19 well-formed texts there it calls 6 garbage, which answer a different question
from the one asked, as a broken model does: in form they are answers. In the tuning part it was 52 of 53, and none of 6.

| part | judge | garbage | caught | missed | answers | accepted | accused | caught share | accused share |
|---|---|---|---|---|---|---|---|---|---|
{rows}

"upstream's words" looks for *nan* and *inf*, as upstream's detector did.

| source | texts | garbage | missed | accused |
|---|---|---|---|---|
{sources}

Misjudged texts:

| part | how | source | text |
|---|---|---|---|
{wrong}

This page is generated: `python docs/make/garbage_page.py docs/garbage.md`.
"""


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), markdown())
