"""llama.cpp as an oracle for logits: the same weights dequantised to F32, KV in F32, no flash attention.

Quantised, llama.cpp rounds activations to 8 bits and disagrees with itself by tenths of a logit; in F32 it agrees with
itself to 2e-5, whichever way the prompt is cut.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.conversion.converter import convert, export


def f32_copy(source: Path, folder: Path) -> Path:
    """`source` (GGUF) with every tensor dequantised, as GGUF in `folder`: four bytes a parameter."""
    apr, gguf = folder / f"{source.stem}-f32.apr", folder / f"{source.stem}-f32.gguf"
    convert(source, apr, quantize="f32")
    export(apr, gguf)
    apr.unlink()
    return gguf


def serve(path: Path, threads: int = 1) -> Any:
    """A llama.cpp server over `path`; needs the extra `peer`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
    params.cpuparams.n_threads, params.cpuparams_batch.n_threads, params.verbosity = threads, threads, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def logprobs(server: Any, tokens: Sequence[int], vocab: int) -> np.ndarray:
    """Log-probabilities float64 ``(V,)`` of the token after `tokens`.

    Normalised again here: llama.cpp sums 151,936 probabilities in float32, and is off by up to 3e-4 for that alone.
    """
    answer = server.handle_completions(
        {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "logprobs": vocab, "cache_prompt": False}
    )
    (first,) = answer["choices"][0]["logprobs"]["content"]
    out = np.full(vocab, np.nan)
    for entry in first["top_logprobs"]:
        out[entry["id"]] = entry["logprob"]
    assert not np.isnan(out).any(), "some token has no probability"
    return log_softmax(out)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 (V,)."""
    x = logits.astype(np.float64)
    x -= x.max()
    return np.asarray(x - np.log(np.exp(x).sum()))


def llama_says(path: Path, text: str = "What is 2+2?") -> dict[str, Any]:
    """llama.cpp's prompt ids and greedy answer, or ``{"refused": reason}``; a crash of its own is a refusal, too."""
    child = Path(__file__).with_name("llama_child.py")
    done = subprocess.run([sys.executable, str(child), str(path), text], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"refused": f"it died with status {done.returncode}"}


class _Params(ctypes.Structure):
    """`llama_model_params` by value: longer than the real one, which is read from its beginning."""

    _fields_ = (("bytes", ctypes.c_ubyte * 1024),)


@contextmanager
def llama_vocabulary(path: Path) -> Iterator[tuple[Callable[..., list[int]], set[int]]]:
    """llama.cpp's tokenizer of a file, called as ``(text, parse_special, add_special=False)``, and the ids that it ends at."""
    import xllamacpp

    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    llama, pointer, ids = ctypes.CDLL(str(library)), ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)
    llama.llama_model_default_params.restype = _Params
    llama.llama_model_load_from_file.argtypes, llama.llama_model_load_from_file.restype = [ctypes.c_char_p, _Params], pointer
    llama.llama_model_free.argtypes = [pointer]
    llama.llama_model_get_vocab.argtypes, llama.llama_model_get_vocab.restype = [pointer], pointer
    llama.llama_vocab_n_tokens.argtypes = [pointer]
    llama.llama_vocab_is_eog.argtypes, llama.llama_vocab_is_eog.restype = [pointer, ctypes.c_int32], ctypes.c_bool
    llama.llama_tokenize.argtypes = [
        pointer, ctypes.c_char_p, ctypes.c_int32, ids, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp refuses {path}"
    vocab = llama.llama_model_get_vocab(model)

    def tokenise(text: str, parse_special: bool = True, add_special: bool = False) -> list[int]:
        raw = text.encode()
        out = (ctypes.c_int32 * (len(raw) + 8))()
        count = llama.llama_tokenize(vocab, raw, len(raw), out, len(out), add_special, parse_special)
        assert count >= 0
        return list(out[:count])

    try:
        yield tokenise, {n for n in range(llama.llama_vocab_n_tokens(vocab)) if llama.llama_vocab_is_eog(vocab, n)}
    finally:
        llama.llama_model_free(model)
