"""Contract q8 against llama.cpp on the same quantised weights, next to llama.cpp against itself.

    python benchmarks/logits_q8.py MODEL.gguf [--threads 2]

Log-probabilities after a few prompts: jit with contract q8 (one token at a time, fused kernels), llama.cpp with the prompt
in one batch, llama.cpp with batches of one token; KV in float32, no flash attention. Needs the extra `peer`. Both round
activations to 8 bits, and a last bit of a float decides about whole steps there: the second column is what such flips cost
llama.cpp alone, and the first should be of its size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from peer import log_softmax, logprobs

from aprlab import engines
from aprlab.architectures.qwen2 import forward
from aprlab.formats import open_model
from aprlab.inference.tokenizer import Qwen2Tokenizer

PROMPTS = ["What is 2+2?", "def fibonacci(n):\n    ", "The capital of France is"]


def serve(path: Path, threads: int, batch: int) -> Any:
    """llama.cpp over the quantised file, `batch` tokens at a time."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
    params.n_batch, params.n_ubatch = 512, batch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model = open_model(options.model)
    tokenizer, config = Qwen2Tokenizer(model.tokenizer), model.config
    found: dict[str, list[np.ndarray]] = {}
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    for name in ("f32", "q8"):
        engine = engines.create("jit", model, options.threads, contract=name)
        for tokens in prompts:
            cache = engine.new_cache(config, len(tokens))
            for token in tokens:
                logits = forward(engine, config, [token], cache)
            found.setdefault(name, []).append(log_softmax(engine.to_numpy(logits)[-1]))
    for name, batch in (("llama.cpp, one batch", 512), ("llama.cpp, token by token", 1)):
        server = serve(options.model, options.threads, batch)
        found[name] = [logprobs(server, tokens, config.vocab_size) for tokens in prompts]
        del server
    pairs = [
        ("llama.cpp, one batch", "q8"),
        ("llama.cpp, token by token", "q8"),
        ("llama.cpp, token by token", "llama.cpp, one batch"),
        ("f32", "q8"),
        ("f32", "llama.cpp, one batch"),
    ]
    print(f"{options.model.name}: worst difference of a log-probability (of the likeliest hundred), KL in nats, same top token")
    for a, b in pairs:
        cells = []
        for p, q in zip(found[a], found[b], strict=True):
            top = np.argsort(-p)[:100]
            kl = float((np.exp(p) * (p - q)).sum())
            same = "same" if p.argmax() == q.argmax() else "OTHER"
            cells.append(f"{np.abs(p - q).max():.2f} ({np.abs(p - q)[top].max():.2f}) {kl:.1e} {same}")
        print(f"{a:26} | {b:21} | " + " | ".join(cells))


if __name__ == "__main__":
    main()
