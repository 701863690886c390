"""llama.cpp on one file, in a process of its own: ``python llama_child.py FILE [TEXT]`` prints one line of JSON.

``{"refused": reason}`` where it does not load the file, else ``{"ids": prompt ids, "answer": greedy tokens}``. It goes
through the C API of the wheel xllamacpp (extra `peer`). Parameter structs are opaque: they are passed by value in memory,
so a buffer that is large enough serves every version.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

STEPS = 6


class Parameters(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * 512),)


class Batch(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), *((name, ctypes.c_void_p) for name in "abcdef"))


def library() -> Any:
    import xllamacpp

    lib = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", Parameters, []), ("llama_context_default_params", Parameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Parameters]),
        ("llama_init_from_model", pointer, [pointer, Parameters]), ("llama_batch_get_one", Batch, [pointer, number]),
        ("llama_decode", number, [pointer, Batch]), ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_tokenize", number,
         [pointer, ctypes.c_char_p, number, pointer, number, ctypes.c_bool, ctypes.c_bool]),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def ask(path: str, text: str) -> dict[str, Any]:
    lib, said = library(), []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    log = kind(lambda level, line, user: said.append(line.decode(errors="replace")) if level >= 4 else None)
    lib.llama_log_set(log, None)
    model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
    if not model:
        return {"refused": said[0].strip() if said else "without a word"}
    vocabulary, data = lib.llama_model_get_vocab(model), text.encode()
    room = len(data) + 8
    ids = (ctypes.c_int32 * room)()
    count = lib.llama_tokenize(vocabulary, data, len(data), ids, room, True, True)
    settings = lib.llama_context_default_params()
    if count + STEPS > 512:  # the structure begins with the context's length, in tokens, and that of a batch
        settings.bytes[0:8] = struct.pack("<II", *[-(-(count + STEPS) // 256) * 256] * 2)
    context = lib.llama_init_from_model(model, settings)
    answer, feed = [], list(ids[:count])
    for _ in range(STEPS):
        tokens = (ctypes.c_int32 * len(feed))(*feed)  # the batch points into it
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(feed))):
            return {"refused": "llama_decode failed"}
        logits = lib.llama_get_logits_ith(context, -1)
        values = [logits[n] for n in range(lib.llama_vocab_n_tokens(vocabulary))]
        feed = [max(range(len(values)), key=values.__getitem__)]
        answer += feed
    return {"ids": list(ids[:count]), "answer": answer}


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], *sys.argv[2:] or ["What is 2+2?"])))
