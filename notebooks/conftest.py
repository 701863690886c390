"""nbval on the notebooks of this folder: what is compared and in which world the kernels start.

Words are compared strictly. Skipped are stderr (progress, warnings of libraries), HTML (tables with measured figures
stand beside their plain text, which is compared) and widget views (random ids). nbval skips pictures by itself:
figures are tested on their artists in tests/.
"""

from __future__ import annotations

import os

import pytest

SKIPPED = ("stderr", "text/html", "application/vnd.jupyter.widget-view+json")


def pytest_collectstart(collector: pytest.Collector) -> None:
    if collector.path.suffix != ".ipynb":
        return
    os.environ.pop("MPLBACKEND", None)  # with agg the inline figures would vanish
    os.environ["TQDM_DISABLE"] = "1"
    collector.skip_compare = (*collector.skip_compare, *SKIPPED)  # type: ignore[attr-defined]
