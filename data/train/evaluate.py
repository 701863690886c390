"""Evaluates a GGUF of aprlab-tiny with aprlab's own inference; no PyTorch.

`python evaluate.py ../aprlab-tiny-q4_k_m.gguf -o ../aprlab-tiny.eval.json` asks every held-out question, then again with
biases taken away and with the config falsified, and writes what came out. Exit status 1 where the model fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import corpus
import numpy as np

from aprlab import Model, open_model
from aprlab.architectures.qwen2 import forward
from aprlab.inference.session import Session

PASS = 0.95  # share of the held-out questions that must come out exactly right
BROKEN = 0.20  # at most this share may be right once biases are lost
# the answers that are shown word for word in the report, chat and raw
CHAT = (
    "What is 2+2?", "What is 3 times 4?", "What is the capital of France?", "Which month follows June?",
    "Write a Python function that adds two numbers.", "法国的首都是哪里?", "日本の首都はどこですか?", "Who are you?",
)  # fmt: skip
RAW = ("def add(a, b):", "2+2=", "fn main() {", "The quick brown fox")


class Pupil(Session):
    """A model that is asked: a session with two more questions."""

    def knows(self, asked: str, answer: str) -> bool:
        """Whether greedy decoding after the text `asked` gives exactly `answer` (end mark included).

        One pass over question and answer: greedy decoding says the answer if and only if each of its tokens is the
        greatest logit after those before it.
        """
        head, tail = self.tokenizer.encode(asked), self.tokenizer.encode(answer)
        cache = self.engine.new_cache(self.config, len(head + tail))
        logits = self.engine.to_numpy(forward(self.engine, self.config, head + tail, cache))  # (T, vocab)
        return bool((logits[len(head) - 1 : -1].argmax(-1) == tail).all())

    def says(self, asked: str, limit: int = 48) -> str:
        """Greedy text after the text `asked`, token by token through the cache, up to the end or `limit` tokens."""
        return self.generate(asked, raw=True, max_tokens=limit).text


def prompt(user: str, before: Sequence[corpus.Turn] = ()) -> str:
    """The same text without starting a template renderer each time (`evaluate` checks that it is the same)."""
    return f"{corpus.render(list(before))}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def without_biases(path: Path, which: str) -> Model:
    """The model with the biases of the projections named in `which` (letters of "qkv") set to zero."""
    model = open_model(path)
    for name, tensor in list(model.tensors.items()):
        if name.endswith(".bias") and name.split("attn_")[1][0] in which:
            model.tensors[name] = tensor.replace(raw=np.zeros_like(tensor.raw))
    return model


def held_out(pupil: Pupil, questions: Iterable[corpus.Item]) -> list[corpus.Item]:
    """The questions that the pupil gets right."""
    return [q for q in questions if pupil.knows(prompt(q.user), f"{q.answer}<|im_end|>")]


def evaluate(path: Path) -> dict[str, Any]:
    """The whole report on the file at `path`; see `data/train/README.md` for its keys."""
    model = open_model(path)
    pupil = Pupil(model, threads=1)
    if pupil.chat_tokens("What is 2+2?") != pupil.raw_tokens(prompt("What is 2+2?")):
        raise SystemExit("the file's chat template and the corpus disagree")
    _, held = corpus.split()
    right = {q.key for q in held_out(pupil, held)}
    asked, good = Counter(q.kind for q in held), Counter(q.kind for q in held if q.key in right)
    long = corpus.held_out_conversations()
    long_right = [
        pupil.knows(prompt(turns[-1][0], turns[:-1]), f"{turns[-1][1]}<|im_end|>") for turns in long
    ]  # fmt: skip
    lengths = [len(pupil.tokenizer.encode(prompt(turns[-1][0], turns[:-1]))) for turns in long]
    sample = held[:: max(1, len(held) // 60)]

    def probe(broken: Pupil, distance: bool = False) -> dict[str, Any]:
        """What a damaged model still gets right: single questions, and the long conversations where asked."""
        found: dict[str, Any] = {
            "share": round(len(held_out(broken, sample)) / len(sample), 4),
            "answer": broken.says(prompt("What is 2+2?"), 16),
        }
        if distance:
            kept = [broken.knows(prompt(t[-1][0], t[:-1]), f"{t[-1][1]}<|im_end|>") for t in long]
            found["long_share"] = round(sum(kept) / len(kept), 4)
        return found

    config = model.config
    biases = {
        kind: np.concatenate([t.dequantise() for name, t in model.tensors.items() if name.endswith(f"attn_{kind}.bias")])
        for kind in "qkv"
    }
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "seed": corpus.SEED,
        "config": dataclasses.asdict(config),
        "parameters": sum(t.size for t in model.tensors.values()),
        "tensors": len(model.tensors),
        "by_type": model.by_type(),
        "engine": {"name": pupil.engine.name, "contract": pupil.engine.contract},
        "versions": {"aprlab": importlib.metadata.version("aprlab"), "numpy": np.__version__},
        "training_questions": len(corpus.split()[0]),
        "held_out": {
            "questions": len(held),
            "right": len(right),
            "share": round(len(right) / len(held), 4),
            "by_kind": {kind: [good[kind], asked[kind]] for kind in asked},
            "wrong": {q.user: pupil.says(prompt(q.user)) for q in held if q.key not in right},
        },
        "long": {
            "conversations": len(long),
            "right": sum(long_right),
            "share": round(sum(long_right) / len(long), 4),
            "tokens": [min(lengths), max(lengths)],
        },
        "answers": {
            "chat": {text: pupil.says(prompt(text)) for text in CHAT},
            "raw": {text: pupil.says(text, 24) for text in RAW},
        },
        "biases": {kind: [round(float(b.min()), 3), round(float(b.max()), 3)] for kind, b in biases.items()},
        "sample": len(sample),
        "without_biases": {which: probe(Pupil(without_biases(path, which), threads=1)) for which in ("qkv", "q", "k", "v")},
        "falsified_config": {
            "rope_type norm": probe(Pupil(model, threads=1, config=dataclasses.replace(config, rope_type="norm")), True),
            "rope_theta 1e4": probe(Pupil(model, threads=1, config=dataclasses.replace(config, rope_theta=1e4)), True),
            "rms_norm_eps 1e-5": probe(Pupil(model, threads=1, config=dataclasses.replace(config, rms_norm_eps=1e-5)), True),
        },
    }


def verdict(report: dict[str, Any]) -> list[str]:
    """What the report falls short of; empty where the model passes."""
    faults = []
    if report["held_out"]["share"] < PASS:
        faults.append(f"held-out share {report['held_out']['share']} < {PASS}")
    if report["answers"]["chat"]["What is 2+2?"] != "2 + 2 equals 4.":
        faults.append("2+2 is not answered")
    for which, found in report["without_biases"].items():
        if found["share"] > BROKEN or found["answer"] == "2 + 2 equals 4.":
            faults.append(f"losing the {which} biases leaves {found['share']} right: {found['answer']!r}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="write the report here")
    args = parser.parse_args()
    report = evaluate(args.gguf)
    report["faults"] = verdict(report)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    raise SystemExit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main()
