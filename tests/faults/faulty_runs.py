"""What the tests of faults share about runs: a healthy model with its traces, and where two traces differ first."""

from __future__ import annotations

import numpy as np

from aprlab.faults import session_with
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.tracing.traces import Trace, trace

QUESTION = "What is 2+2?"


def first_difference(a: Trace, b: Trace) -> tuple[str, list[int]] | None:
    """The first point whose values are not equal bit for bit (whatever their shape), and at which rows."""
    for name, point in a.points.items():
        x, y = (values.reshape(len(values), -1) for values in (point.values, b.points[name].values))
        if not np.array_equal(x, y):
            return name, [row for row in range(len(x)) if not np.array_equal(x[row], y[row])]
    return None


class Base:
    """A healthy model as a fault needs it, and its traces."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.session = session_with(model, [])
        self.ids = self.session.prompt_tokens(QUESTION)[-6:]
        self.traces = {chunk: trace(self.session, self.ids, chunk=chunk) for chunk in (None, 1)}


def answer(session: Session, prompt: str = QUESTION, max_tokens: int = 12) -> str:
    return session.generate(prompt, max_tokens=max_tokens).text
