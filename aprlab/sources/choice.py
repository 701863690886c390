"""A source by name: ``reference``, ``jit,contract=q8``, ``llama.cpp,cache=f16,flash=on``, or a session that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aprlab import engines
from aprlab.engines.contracts import Contract
from aprlab.errors import UsageError
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.sources import dumps, eval_callback, llama_cpp, servers, torch_hooks
from aprlab.sources.base import Source
from aprlab.sources.engines import EngineSource

Spec = str | Session | Source  # or a model of torch, which has no type here


_ARRAYS = (".npy", ".safetensors", ".pt", ".pth", ".bin")
_LLAMA = {llama_cpp.NAME: None, llama_cpp.PYTHON: llama_cpp.PYTHON}  # source -> package
_OPTIONS = {**dict.fromkeys(_LLAMA, ("cache", "flash", "repack")), torch_hooks.NAME: ("folder", "dtype", "attention")}


def source(what: Any, model: Any = None, *, threads: int | None = None) -> Source:
    """The program called `what`, ready to run `model`.

    Args:
        what: one of our engines as `engines.create` knows it (``auto``, ``jit:q8``) or ``llama.cpp`` (``llama-cpp-python``:
            through that package), with options after commas (``jit,contract=q8``, ``llama.cpp,cache=f32,flash=on``); a
            recording: a trace (``.npz``) or the mapping of a dump (``.yaml``); what `llama-eval-callback` printed (``.txt``,
            ``.log``, with the server's options for a contract);
            a server (``http://127.0.0.1:8080,model=NAME,activations=f16,cache=f16,seconds=60``);
            ``transformers,dtype=bf16,attention=sdpa,folder=DIR``; a session; a model of transformers that is there already
            (`Qwen2ForCausalLM` and others); a source, given back as it is.
        model: file or opened model that it runs; not for a session or a source, which have one. With a model of
            transformers: its tokenizer, if there is one.
        threads: CPU threads; None leaves the number to the program.

    Raises:
        UsageError: an unknown name or option, no model.
    """
    if isinstance(what, Source):
        return what
    if torch_hooks.is_live(what):
        return torch_hooks.TorchSource(what, model)
    if isinstance(what, Session):
        return EngineSource(what)
    if what.endswith((".npz", ".yaml", ".yml")):
        return _recording(what, model)
    name, options = parsed(what)
    if name.endswith(eval_callback.ENDINGS):
        return _printout(name, options, model)
    if servers.is_address(name):
        return _server(name, options, model)
    if name.endswith(_ARRAYS) or Path(name).is_dir():
        said = f"{name} holds arrays; what they are is declared in a mapping (.yaml), and that is the source: see docs/sources.md"
        raise UsageError(said, code="source.needs-mapping")
    if name.partition(":")[0] not in known():
        said = f"unknown source {name!r}; known: {', '.join(known())}, http://…, a recording (.npz, .yaml, .txt)"
        raise UsageError(said, code="source.unknown")
    if model is None:
        raise UsageError(f"source {name!r} needs a model", code="source.no-model")
    allowed = _OPTIONS.get(name, ("contract",))
    unknown = set(options) - set(allowed)
    if unknown:
        said = f"source {name!r} has no option {min(unknown)!r}; known: {', '.join(allowed)}"
        raise UsageError(said, code="source.unknown-option")
    opened = model if isinstance(model, Model) else open_model(model)
    if name == torch_hooks.NAME:
        return torch_hooks.loaded(opened, **options)
    if name in _LLAMA:
        flash, repack = _switch(what, options.pop("flash", "off")), options.pop("repack", None)
        options["repack"] = None if repack is None else _switch(what, repack)
        return llama_cpp.LlamaSource(opened, flash=flash, threads=threads, package=_LLAMA[name], **options)
    return EngineSource(Session(opened, engine=name, threads=threads, **options))


def _recording(path: str, model: str | Path | Model | None) -> Source:
    if path.endswith(".npz"):
        return dumps.recorded(path)
    if model is None:
        raise UsageError(f"{path}: a dump needs the model whose points it holds", code="source.no-model")
    return dumps.dump(path, (model if isinstance(model, Model) else open_model(model)).config)


def _printout(path: str, options: dict[str, Any], model: str | Path | Model | None) -> Source:
    if model is None:
        raise UsageError(f"{path}: a printout needs the model that was run", code="source.no-model")
    opened = model if isinstance(model, Model) else open_model(model)
    found = eval_callback.PrintoutSource(path, opened)
    if options:
        ours = found.contract
        flash = "on" if ours.flash else "off"
        rules = {"activations": ours.activations, "cache": ours.cache, "flash": flash, "values": ours.values}
        found.contract = _contract(path, rules, options, set())
    return found


def _contract(what: str, rules: dict[str, str], options: dict[str, Any], others: set[str]) -> Contract:
    """A contract from its parts and what options change of them."""
    unknown = set(options) - others - set(rules)
    if unknown:
        said = f"source {what!r} has no option {min(unknown)!r}; known: {', '.join([*sorted(others), *rules])}"
        raise UsageError(said, code="source.unknown-option")
    rules = rules | {key: value for key, value in options.items() if key in rules}
    return Contract(rules["activations"], rules["cache"], _switch(what, rules["flash"]), rules["values"])


def _server(url: str, options: dict[str, Any], model: str | Path | Model | None) -> Source:
    if model is None:
        raise UsageError(f"{url}: a server needs the model that it should be running", code="source.no-model")
    opened = model if isinstance(model, Model) else open_model(model)
    rules = {"activations": llama_cpp.activations_of(opened), "cache": "f16", "flash": "off", "values": "f32"}
    contract = _contract(url, rules, options, {"model", "seconds"})
    return servers.ServerSource(
        url, opened, name=options.get("model"), contract=contract, seconds=_seconds(options.get("seconds", "120"))
    )


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 86_400:
        raise UsageError(f"seconds={text}: a number up to 86400 is needed", code="source.bad-option")
    return found


def known() -> tuple[str, ...]:
    """Names of all sources."""
    return (*engines.NAMES, engines.AUTO, *_LLAMA, torch_hooks.NAME)


def _switch(what: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise UsageError(f"source {what!r}: {value!r} is neither on nor off", code="source.bad-option")
    return value == "on"


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``name,key=value,…``; raises UsageError where an option has no value."""
    name, *rest = (part.strip() for part in text.split(","))
    options = {}
    for part in rest:
        key, mark, value = (piece.strip() for piece in part.partition("="))
        if not mark or not key or not value or key in options:
            raise UsageError(f"source {text!r}: {part!r} is not KEY=VALUE", code="source.bad-option")
        options[key] = value
    return name, options
