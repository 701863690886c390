"""Figures of kernels: what each source line cost, and what memory and arithmetic allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, need_data, nth_colour, plain, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class LineCost(Protocol):
    """What a source line cost; `aprlab.kernels.ptx` counts it."""

    file: str
    line: int
    thread_instructions: int
    requests: int
    sectors: int
    wavefronts: int


_KINDS = ("reads or writes global memory", "shared memory", "arithmetic only")
_ASIDE: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (-0.04, -0.01), "ncols": 2, "columnspacing": 1.2}
_LONGEST = 72  # letters of a source line that are shown


def ptx_profile(
    lines: Sequence[LineCost],
    source: Mapping[str, str] | None = None,
    ax: Axes | None = None,
    *,
    per: float | None = None,
    most: int = 14,
) -> Axes:
    """Executed instructions by source line, the most expensive lines, in source order; memory traffic next to the bars.

    Args:
        lines: what each line cost.
        source: file name -> its text, shown at the bars; without it they have numbers only.
        per: instructions are divided by this (the number of weights, say); by default they are shares of all.
        most: so many lines get a bar; the cheaper ones share the last, hatched.
    """
    need_data({"lines": lines})
    shown = sorted(sorted(lines, key=lambda one: -one.thread_instructions)[:most], key=lambda one: (one.file, one.line))
    rest = sum(one.thread_instructions for one in lines) - sum(one.thread_instructions for one in shown)
    scale = per or sum(one.thread_instructions for one in lines) / 100
    names = [_name(one, source or {}) for one in shown]
    ax = axes_or_new(ax, 9, 0.24 * (len(shown) + bool(rest)) + 0.9)
    with style():
        colours = {_KINDS[0]: nth_colour(1), _KINDS[1]: nth_colour(4), _KINDS[2]: nth_colour(0)}
        kinds = [_KINDS[0] if one.sectors else _KINDS[1] if one.wavefronts else _KINDS[2] for one in shown]
        values = [one.thread_instructions / scale for one in shown]
        ax.barh(range(len(shown)), values, color=[colours[kind] for kind in kinds], height=0.75)
        for place, (one, value) in enumerate(zip(shown, values, strict=True)):
            per_request = one.sectors / one.requests if one.sectors else one.wavefronts / one.requests if one.requests else 0
            what = "sectors" if one.sectors else "wavefronts"
            text = f"{one.requests} requests × {per_request:.3g} {what}" if one.requests else ""
            ax.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7, color="0.3")
        if rest:
            bar: dict[str, Any] = {"color": "white", "edgecolor": "0.5", "hatch": "///", "height": 0.75}
            ax.barh(len(shown), rest / scale, **bar)
            names.append(f"the other {len(lines) - len(shown)} lines")
        ax.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=7, family="monospace")
        ax.set_xlabel("executed instructions: " + ("% of all" if per is None else "per weight"))
        ax.set_xlim(right=1.25 * max([*values, rest / scale]))
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        present = [kind for kind in _KINDS if kind in kinds]
        ax.legend(handles=[Patch(color=colours[kind], label=plain(kind)) for kind in present], fontsize=8, **_ASIDE)
    return ax


def _name(line: LineCost, source: Mapping[str, str]) -> str:
    """File, number and text of a line, cut to a length."""
    name = f"{line.file.rsplit('/', 1)[-1]}:{line.line}" if line.file else "(no line)"
    text = source.get(line.file, source.get(line.file.rsplit("/", 1)[-1], "")).splitlines()
    code = text[line.line - 1].split("//")[0].strip() if 0 < line.line <= len(text) else ""
    room = _LONGEST - len(name) - 2
    code = code if len(code) <= room else code[: room - 1] + "…"
    return f"{code}  {name}" if code else name


def roofline(
    kernels: Mapping[str, float],
    machines: Mapping[str, tuple[float, float]],
    ax: Axes | None = None,
    *,
    measured: Mapping[tuple[str, str], float] | None = None,
) -> Axes:
    """What memory and instruction issue allow: instructions a second over instructions for each byte read, both logarithmic.

    Args:
        kernels: label -> instructions issued for each byte of weights.
        machines: label -> (bytes a second, instructions a second). Left of its corner a machine waits for memory.
        measured: (machine, kernel) -> instructions a second that were reached; drawn filled. Predictions are hollow.

    Raises:
        UsageError: nothing to draw, or a measurement of what is not drawn.
    """
    need_data({"kernels": list(kernels), "machines": list(machines)})
    for machine, kernel in measured or {}:
        if machine not in machines or kernel not in kernels:
            raise UsageError(
                f"{kernel!r} on {machine!r} was measured but is not among what is drawn", code="figures.measured-not-drawn"
            )
    ax = axes_or_new(ax, 9, 4.2)
    corners = [issue / bandwidth for bandwidth, issue in machines.values()]
    low, high = 0.5 * min([*kernels.values(), *corners]), 2.0 * max([*kernels.values(), *corners])
    x = np.geomspace(low, high, 200)
    with style():
        for n, (name, (bandwidth, issue)) in enumerate(machines.items()):
            roof: dict[str, Any] = {"color": nth_colour(n), "linestyle": ("-", "--")[n % 2]}
            ax.plot(x, np.minimum(bandwidth * x, issue), label=plain(f"{name}: corner at {issue / bandwidth:.1f}"), **roof)
            places = np.array(list(kernels.values()))
            points: dict[str, Any] = {"facecolors": "white", "edgecolors": nth_colour(n), "linewidths": 1.5, "s": 36, "zorder": 3}
            ax.scatter(places, np.minimum(bandwidth * places, issue), **points)
        for (machine, kernel), reached in (measured or {}).items():
            colour = nth_colour(list(machines).index(machine))
            ax.scatter([kernels[kernel]], [reached], color=colour, s=36, zorder=4)
        ax.set_xscale("log")
        ax.set_yscale("log")
        bottom = 0.35 * min(bandwidth * min(kernels.values()) for bandwidth, _ in machines.values())
        ax.set(xlim=(low, high), ylim=(bottom, 1.8 * max(issue for _, issue in machines.values())))
        previous = 0.0
        for name, place in sorted(kernels.items(), key=lambda item: item[1]):
            ax.axvline(place, color="0.7", linewidth=0.7, zorder=0)
            at = max(place, previous * 1.09)  # labels that would lie on each other move aside
            ax.annotate(
                plain(name), (place, bottom), xytext=(at, bottom * 1.15), rotation=90, ha="center", va="bottom", fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
            previous = at
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("instructions per byte of weights")
        ax.set_ylabel("instructions per second")
        ax.legend(loc="upper left")
    return ax
