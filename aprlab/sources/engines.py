"""Our own engines as sources: the same code path as for every other program."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aprlab.architectures import forward, points
from aprlab.engines.base import Array
from aprlab.engines.contracts import Contract
from aprlab.inference.session import Session
from aprlab.sources.base import Abilities, Source
from aprlab.tracing.traces import Point, Recorder, Trace
from aprlab.version import __version__


class EngineSource(Source):
    """A session of ours: its engine, its config.

    Args:
        session: what runs; closing the source closes its engine.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.name, self.version = session.engine.name, __version__
        self.file, self.config = session.model.path, session.config
        self.contract = Contract.parse(session.engine.contract)
        self.can = Abilities(tuple(points(session.config)), injection=True, text=True)

    def _run(self, ids: list[int], wanted: list[str], first: int, inject: Mapping[str, Point]) -> Trace:
        engine = self.session.engine
        recorder = Recorder(engine, wanted)
        start = 0

        def tap(point: str, x: Array) -> Array:
            given = inject.get(point)
            if given is not None:
                inside = (start <= given.positions) & (given.positions < start + x.shape[0])
                values = np.array(engine.to_numpy(x))
                values[given.positions[inside] - start] = given.values[inside]
                x = engine.from_numpy(values)
            return recorder(point, x)

        cache = engine.new_cache(self.config, len(ids))
        forward(engine, self.config, ids[:first], cache, tap)
        for start in range(first, len(ids)):
            forward(engine, self.config, ids[start : start + 1], cache, tap)
        model = self.session.model
        origin = {"path": str(model.path), "format": model.format, "version": self.version}
        return Trace(recorder.points(len(ids)), ids, self.name, str(self.contract), self.config, origin, first)

    def close(self) -> None:
        self.session.engine.close()
