"""Hostile files through verbs: `every_verb.py` for all of them; here those with most different code behind them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and looks at a child's peak")


def seen(*words: str, before: str = "") -> list[dict]:
    """What `every_verb.py` says, run in a small process: a child begins with its parent's peak."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.argv[1:] = {[*words, '--json']!r}\nimport every_verb\n{before}\n"
    code += "sys.exit(every_verb.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_hostile_files_give_one_line_or_the_right_answer() -> None:
    rows = seen("--verbs", "inspect --json,peel,run --json")
    assert len(rows) > 40
    wrong = [row for row in rows if [w for w in row["wrong"] if not w.endswith(" s")] or row["seconds"] > 10]  # a busy machine
    assert wrong == []
    assert {row["status"] for row in rows} >= {0, 2}


def test_text_that_a_terminal_obeys_is_seen() -> None:
    """The mutant: the door for text lets everything through."""
    rows = seen(
        "--only", "name-escapes", "--verbs", "inspect",
        before="from aprlab.cli import output; output.printable = lambda text, lines=False: text",
    )  # fmt: skip
    assert any("the terminal obeys" in word for row in rows for word in row["wrong"]), rows


def test_a_traceback_and_bare_nan_are_seen() -> None:
    """More mutants: an error that is no AprlabError, and JSON with a bare NaN."""
    broken = "from aprlab.model import description; description.describe = lambda *_: 1 / 0"
    assert "a traceback" in seen("--only", "nan-key", "--verbs", "inspect", before=broken)[0]["wrong"]
    bare = "from aprlab.cli import output; output.say_json = lambda value: print('{\"x\": NaN}')"
    assert "not JSON" in seen("--only", "nan-key", "--verbs", "inspect --json", before=bare)[0]["wrong"][0]
