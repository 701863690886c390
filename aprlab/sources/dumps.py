"""A recording of another program as a source: arrays on disk, and a mapping that declares what each of them is.

The mapping (YAML) names points, positions and layout; whatever it does not declare is not in the trace, and nothing is
guessed. A convention such as "the layer's output without the residual" is declared by the point that it is: ``down``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.architectures import points as all_points
from aprlab.engines.contracts import Contract
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.formats import yaml_files
from aprlab.model.config import ModelConfig
from aprlab.sources.base import Abilities, Source
from aprlab.sources.dump_arrays import Reader, arrays_of
from aprlab.tracing.traces import Point, Trace, matching

LAYOUTS: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "positions-first": lambda x, shape: x.reshape(-1, *shape),
    "heads-first": lambda x, shape: x.reshape(shape[0], -1, *shape[1:]).swapaxes(0, 1),  # (H, P, D), of heads alone
    "channels-first": lambda x, shape: x.reshape(int(np.prod(shape)), -1).T.reshape(-1, *shape),
}
# Names that programs give their arrays; of these, those that are not there are left out.
NAMES: dict[str, dict[str, Any]] = {
    "aprt": {  # upstream's `apr trace --save-tensor DIR`, each stage a file; q, k and v before rotation are one array there
        "layer-0/embedding": "embed", "layer-{n}/attn_norm": "layers.{n}.attn_norm", "layer-{n}/q_post_rope": "layers.{n}.q_rope",
        "layer-{n}/k_post_rope": "layers.{n}.k_rope", "layer-{n}/attention": "layers.{n}.attn",
        "layer-{n}/attn_out": "layers.{n}.attn_out", "layer-{n}/post_attn_residual": "layers.{n}.ffn_inp",
        "layer-{n}/ffn_norm": "layers.{n}.ffn_norm", "layer-{n}/ffn_gate": "layers.{n}.gate", "layer-{n}/ffn_up": "layers.{n}.up",
        "layer-{n}/ffn_swigl": "layers.{n}.swiglu", "layer-{n}/ffn_out": "layers.{n}.down",
        "layer-{n}/post_ffn_residual": "layers.{n}.out", "final_norm": "norm",
        "lm_head": {"point": "logits", "positions": "last"},
    },
    "modules": {  # outputs of the modules of a Hugging Face model, by hooks; the layers' own, too
        "model.embed_tokens": "embed", "model.layers.{n}.input_layernorm": "layers.{n}.attn_norm",
        "model.layers.{n}.self_attn.q_proj": "layers.{n}.q", "model.layers.{n}.self_attn.k_proj": "layers.{n}.k",
        "model.layers.{n}.self_attn.v_proj": "layers.{n}.v", "model.layers.{n}.self_attn.o_proj": "layers.{n}.attn_out",
        "model.layers.{n}.post_attention_layernorm": "layers.{n}.ffn_norm", "model.layers.{n}.mlp.gate_proj": "layers.{n}.gate",
        "model.layers.{n}.mlp.up_proj": "layers.{n}.up", "model.layers.{n}.mlp.down_proj": "layers.{n}.down",
        "model.layers.{n}": "layers.{n}.out", "model.norm": "norm", "lm_head": "logits",
    },
}  # fmt: skip
_KEYS = {"arrays", "program", "version", "contract", "tokens", "prompt", "points"}


class RecordedSource(Source):
    """A trace that is there already: it gives the tokens that it has run, and no others.

    Args:
        trace: what was recorded.
        file: where.
    """

    def __init__(self, trace: Trace, file: Path) -> None:
        self.trace, self.file = trace, file
        self.name, self.version, self.config = trace.engine, trace.source.get("version", ""), trace.config
        self.contract = Contract.parse(trace.contract)
        logits = trace.points.get("logits")
        said = "none" if logits is None else "all" if len(logits.positions) == len(trace.tokens) else "last"
        self.can = Abilities(tuple(trace), positions="given", logits=said, reruns=False)  # type: ignore[arg-type]
        self.recorded = list(trace.tokens), trace.prompt

    def _run(self, ids: list[int], wanted: list[str], first: int, inject: Mapping[str, Point]) -> Trace:
        if ids != self.trace.tokens:
            said = f"the recording holds a run of {len(self.trace.tokens)} tokens, and these {len(ids)} are others"
            raise UsageError(said, code="source.other-tokens", path=self.file)
        return self.trace.select(wanted)


def recorded(path: str | Path) -> RecordedSource:
    """A trace that `Trace.save` (or `aprlab trace`) wrote, as a source."""
    return RecordedSource(Trace.load(path), Path(path))


def dump(mapping: str | Path, config: ModelConfig) -> RecordedSource:
    """Arrays on disk as a source.

    Args:
        mapping: YAML: `arrays` (``.npz``, ``.safetensors``, ``.pt``, or a folder of ``.npy``, ``.pt`` or APRT files, relative
            to the mapping), `program`, `version`, `contract`, `tokens` (ids), `prompt` (how many went in at once), and `points`:
            from an array's name, in which ``{n}`` is the layer and ``{*}`` any text, to a point, or to a mapping of `point`,
            `layout` and `positions`; or one of `NAMES`, for programs whose names are known.
        config: of the model, which says the shape of each point.

    Raises:
        UsageError: a file cannot be read.
        FormatError: what is declared and what is there contradict each other, by name.
    """
    path = Path(mapping)
    data, line_of = yaml_files.load(path)
    declared = _declared(data, path, line_of)
    arrays = arrays_of(path.parent / declared["arrays"])
    try:
        contract = Contract.parse(declared["contract"])
    except AprlabError as error:
        error.path = error.path or path
        raise
    shapes, tokens = all_points(config), declared["tokens"]
    found: dict[str, Point] = {}
    for name, what in declared["points"].items():
        for array, point in _expanded(name, what, arrays, path):
            if point not in shapes:
                raise FormatError(f"{array!r} is declared as {point!r}, no point of this model", code="dump.no-point", path=path)
            if point in found:
                raise FormatError(f"two arrays are declared as {point!r}", code="dump.point-twice", path=path)
            found[point] = _point(point, arrays[array](), what, shapes[point], len(tokens), declared["program"], contract, path)
    if not found:
        said = f"there is no array of the names {data['points']!r}; there are {', '.join(sorted(arrays)[:8]) or 'none'}"
        raise FormatError(said, code="dump.no-array", path=path)
    ordered = {name: found[name] for name in matching("*", list(shapes)) if name in found}
    source = {"path": str(path), "format": "dump", "version": declared["version"]}
    trace = Trace(ordered, tokens, declared["program"], str(contract), config, source, declared["prompt"])
    return RecordedSource(trace, path)


def _declared(data: Any, path: Path, line_of: yaml_files.LineOf) -> dict[str, Any]:
    """The mapping with every entry of its type; raises FormatError with the line of the first that is not."""

    def need(good: bool, what: str, *keys: Any) -> None:
        if not good:
            raise FormatError(f"line {line_of(*keys)}: {what}", code="dump.mapping", path=path)

    need(isinstance(data, dict), "a mapping of names is expected")
    for key in data:
        need(key in _KEYS, f"unknown key {key!r}; known: {', '.join(sorted(_KEYS))}", key)
    for key in ("arrays", "program", "contract", "tokens", "points"):
        need(key in data, f"{key!r} is not declared")
    for key in ("arrays", "program", "contract", "version"):
        need(isinstance(data.get(key, ""), str), f"{key!r} is not text", key)
    tokens, prompt, points = data["tokens"], data.get("prompt"), data["points"]
    known = isinstance(points, str)
    if known:
        need(points in NAMES, f"points {points!r}; known: {', '.join(NAMES)}, or a mapping of names to points", "points")
        points = NAMES[points]
    good = isinstance(tokens, list) and tokens and all(type(t) is int and t >= 0 for t in tokens)
    need(bool(good), "'tokens' are the ids that were run, as a list", "tokens")
    need(prompt is None or (type(prompt) is int and 1 <= prompt <= len(tokens)), "'prompt' counts tokens", "prompt")
    need(isinstance(points, dict) and bool(points), "'points' maps names of arrays to points", "points")
    out = {}
    for name, what in points.items():
        entry = {"point": what} if isinstance(what, str) else what
        need(isinstance(entry, dict) and isinstance(entry.get("point"), str), f"{name!r} has no point", "points", name)
        for key in entry:
            need(key in ("point", "layout", "positions"), f"{name!r}: unknown key {key!r}", "points", name)
        layout, positions = entry.get("layout", "positions-first"), entry.get("positions", "all")
        need(layout in LAYOUTS, f"{name!r}: layout {layout!r}; known: {', '.join(LAYOUTS)}", "points", name)
        listed = isinstance(positions, list) and all(type(p) is int and 0 <= p < len(tokens) for p in positions)
        listed = listed and len(set(positions)) == len(positions)
        need(positions in ("all", "last") or (listed and bool(positions)), f"{name!r}: positions {positions!r}", "points", name)
        out[str(name)] = {"point": entry["point"], "layout": layout, "positions": positions, "optional": known}
    return {**data, "version": data.get("version", ""), "prompt": prompt, "points": out}


def _expanded(name: str, what: Mapping[str, Any], arrays: Mapping[str, Reader], path: Path) -> list[tuple[str, str]]:
    """Arrays that a name stands for, each with its point: ``{n}`` in it is the layer, ``{*}`` any text."""
    point, words = what["point"], re.split(r"(\{n\}|\{\*\})", name)
    given = {"{n}": r"(\d+)", "{*}": r".*?"}
    pattern = re.compile("".join(given.get(word, re.escape(word)) for word in words))
    hits = [(array, hit) for array in arrays if (hit := pattern.fullmatch(array)) is not None]
    if not hits and not what["optional"]:
        some = ", ".join(sorted(arrays)[:8])
        raise FormatError(f"there is no array {name!r}; there are {some}", code="dump.no-array", path=path)
    return [(array, point.replace("{n}", hit[1]) if hit.groups() else point) for array, hit in hits]


def _point(
    name: str, values: np.ndarray, what: Mapping[str, Any], shape: tuple[int, ...], count: int, program: str, contract: Contract,
    path: Path,
) -> Point:  # fmt: skip
    if not isinstance(values, np.ndarray):  # a member of an archive that is no array
        raise FormatError(f"{name}: what is declared as it is no array", code="dump.not-arrays", path=path)
    positions = {"all": list(range(count)), "last": [count - 1]}.get(str(what["positions"]), what["positions"])
    size = len(positions) * int(np.prod(shape))
    heads = what["layout"] != "heads-first" or len(shape) > 1
    if values.size != size or not heads or values.dtype.kind != "f":
        said = f"{name}: an array {values.dtype}{values.shape} for {len(positions)} positions of {shape}, {what['layout']}"
        raise FormatError(said, code="dump.shape", path=path)
    kept = np.ascontiguousarray(LAYOUTS[what["layout"]](values, shape), np.float32)
    return Point(name, kept, np.array(positions, np.int64), program, str(contract))
