"""What the tests of faults share about files: what each fault is expected to change."""

from __future__ import annotations

from collections.abc import Callable

from differences import by_gguf

from aprlab.faults import FAULTS, Fault
from aprlab.formats.apr import Container
from aprlab.model import names
from aprlab.model.model import Model

E, HEAD, N = "token_embd.weight", "output.weight", "output_norm.weight"
Q, K, V, OUT = (f"blk.N.attn_{x}.weight" for x in ("q", "k", "v", "output"))
GATE, UP, DOWN = (f"blk.N.ffn_{x}.weight" for x in ("gate", "up", "down"))
QB, KB, VB = (f"blk.N.attn_{x}.bias" for x in "qkv")
NORM, FFN_NORM = "blk.N.attn_norm.weight", "blk.N.ffn_norm.weight"
OTHERS = {"blk.N.attn_q_norm.weight", "blk.N.attn_k_norm.weight", "rope_freqs.weight"}  # of other architectures
ALL = {gguf for gguf, _ in names.PAIRS} - OTHERS
MATRICES = {E, HEAD, Q, K, V, OUT, GATE, UP, DOWN}
NOT_SQUARE = MATRICES - {Q, OUT}
BIASES = {QB, KB, VB}
Q4K = MATRICES - {HEAD}
Q6K = {V, DOWN, HEAD}

# id -> kind of difference -> templates of names or metadata keys; every kind that is not named must be absent.
EXPECTED: dict[str, dict[str, set[str]]] = {
    "GH-190": {"renamed": ALL - {HEAD}},
    "short-names": {"renamed": ALL - {HEAD}},
    "raw-names": {"renamed": ALL},
    "swapped-q-k": {"dims": {Q, K, QB, KB}, "size": {Q, K, QB, KB}},
    "swapped-k-v": {"code": {K, V}, "size": {K, V}, "bytes": {K, V, KB, VB}},
    "swapped-gate-up": {"bytes": {GATE, UP}},
    "swapped-layers": {"bytes": ALL - {E, HEAD, N}},
    "lost-qkv-biases": {"bytes": BIASES},
    "lost-q-biases": {"bytes": {QB}},
    "lost-k-biases": {"bytes": {KB}},
    "lost-v-biases": {"bytes": {VB}},
    "missing-biases": {"missing": BIASES},
    "bare-bias-names": {"renamed": BIASES},
    "fused-biases": {"missing": BIASES, "extra": {"model.layers.N.self_attn.qkv_proj.bias"}},
    "unsorted-index": {"order": {"index"}, "problems": {"not sorted"}},
    "duplicate-tensor": {"twice": {N}, "problems": {"is listed twice"}},
    "dropped-tensor": {"missing": {N}},
    "tied-lm-head": {"code": {HEAD}, "size": {HEAD}},
    "zero-lm-head": {"bytes": {HEAD}},
    "default-dequantise": {"code": MATRICES, "size": MATRICES, "metadata": {"quantization"}, "flags": {"quantized"}},
    "offset-shifted": {"offset": ALL, "bytes": ALL, "problems": {"ends at"}},
    "overlapping-tensors": {"offset": {GATE}, "bytes": {GATE}, "problems": {"overlap"}},
    "dims-swapped": {"dims": NOT_SQUARE},
    "double-reversal": {
        "dims": NOT_SQUARE, "code": {E, HEAD, K, V}, "size": {E, HEAD, K, V}, "bytes": {Q, OUT, GATE, UP, DOWN},
    },
    "GH-202": {"bytes": MATRICES},
    "transposed-embedding": {"bytes": {E}},
    "permuted-qk": {"bytes": {Q, K, QB, KB}},
    "scales-flushed": {"bytes": Q6K},
    "scales-floored": {"bytes": Q6K},
    "rope-norm": {"metadata": {"rope_type"}},
    "rope-theta": {"metadata": {"rope_theta"}},
    "mha-dims": {"metadata": {"num_kv_heads"}},
    "head-dim-guessed": {"metadata": {"head_dim", "num_heads", "num_kv_heads"}},
    "head-dim-halved": {"metadata": {"head_dim", "num_heads", "num_kv_heads"}},
    "lm-head-transposed": {"bytes": {HEAD}},
    "norm-plus-one": {"bytes": {NORM, FFN_NORM, N}},
    "foreign-template": {"metadata": {"chat_template"}},
    "wrong-eps": {"metadata": {"rms_norm_eps"}},
    "zeroed-norm": {"bytes": {NORM}},
    "wrong-norm": {"bytes": {NORM}},
    "no-merges": {"metadata": {"tokenizer.merges"}},
    "specials-untyped": {"metadata": {"tokenizer.token_type"}},
    "wrong-pre-tokeniser": {"metadata": {"tokenizer.pre_type"}},
    "template-lost": {"metadata": {"chat_template"}},
    "template-skipped": {"metadata": {"chat_template"}},
    "template-doubled": {"metadata": {"chat_template"}},
    "template-hard-coded": {"metadata": {"chat_template"}},
    "eos-hard-coded": {"metadata": {"tokenizer.eos_token_id"}},
}  # fmt: skip
# Faults of the dtype byte: healthy byte -> written byte, for every byte there is; nothing but codes differs.
CODES = {
    "GH-186": {0: 0, 12: 0, 14: 0},
    "GH-191": {0: 0, 12: 8, 14: 9},
    "GH-191-code": {0: 0, 13: 12},
    "GH-191-reader": {0: 0, 8: 0},
    "GH-191-again": {0: 0, 8: 128},
    "GH-438": {0: 0, 30: 2},
    "GH-438-apr": {0: 0, 128: 8},
    "aprq4-relabelled": {0: 0, 128: 2},
    "bf16-as-f16": {0: 0, 30: 1},
    "bf16-as-f32": {0: 0, 30: 0},
    "apr-q8-as-q8_0": {0: 0, 129: 8},
    "apr-q4-as-q4k": {0: 0, 128: 12},
    "unknown-to-f32": {0: 0, 6: 0},
    "unknown-to-f32-warned": {0: 0, 6: 0},
}
EXPECTED |= {id: {"code": MATRICES} for id in CODES}
# Decoder faults: blocks rewritten; checked against the faulty decoder in test_block_faults.
REWRITTEN = {id for id, fault in FAULTS.items() if fault.registry is not None and fault.seams is not None}
EXPECTED["q6k-sequential"] = {"bytes": Q6K}
EXPECTED |= {id: {"bytes": Q4K if id.startswith("q4k") else MATRICES} for id in REWRITTEN - set(EXPECTED) - {"floor-blocks"}}
ELSEWHERE = {"truncated", "GH-370", "floor-blocks"}  # tests of their own

Healthy = Callable[[Fault], Container]
Source = Callable[[Fault], Model]


def contents(found: Container, name: str) -> bytes:
    return found.bytes_of(by_gguf(found)[name][0]).tobytes()
