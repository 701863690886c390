"""Every file of `attacks.py` gives one line, or the right answer, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import attacks  # noqa: E402

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at a child's peak as Linux tells it")


@pytest.fixture(scope="module")
def costs() -> dict[str, dict[str, object]]:
    done = subprocess.run([sys.executable, HERE / "attacks.py", "--json"], capture_output=True, text=True, timeout=500)
    assert done.stdout, done.stderr
    return {cost["name"]: cost for cost in json.loads(done.stdout)}


@pytest.mark.parametrize("attack", attacks.ATTACKS, ids=lambda attack: attack.name)
def test_it_costs_little(attack: attacks.Attack, costs: dict[str, dict[str, object]]) -> None:
    cost = costs[attack.name]
    assert cost["status"] == attack.status, cost
    assert cost["megabytes"] < attacks.MEGABYTES, cost  # type: ignore[operator]
    assert cost["seconds"] < 5 * attack.seconds, cost  # type: ignore[operator]  # on a busy machine
    assert attack.status != 2 or cost["lines"] == 1, cost


def test_the_measure_sees_what_is_too_much(tmp_path: Path) -> None:
    """Without the budgets a file costs too much, and that is seen: the limit on registers is taken away here."""
    lifted = "import aprlab.kernels.ptx.parser as p, sys; p.MOST_REGISTERS = 10**12; from aprlab.cli.app import run_cli"
    program = tmp_path / "lifted.py"
    program.write_text(f"{lifted}\nsys.exit(run_cli(sys.argv[1:]))\n")
    code = (
        f"import sys, json; sys.path.insert(0, {str(HERE)!r})\n"
        "import attacks; from dataclasses import asdict; from pathlib import Path\n"
        "attack = attacks.Attack('lifted', '', attacks.ptx(attacks.entry('.reg .b32 %r<1800000>;')), 0)\n"
        f"print(json.dumps(asdict(attacks.measure(attack, Path({str(tmp_path)!r}), [sys.executable, {str(program)!r}]))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    cost = json.loads(done.stdout)
    assert not cost["right"] and cost["megabytes"] > attacks.MEGABYTES, cost
