"""How far are aprlab's logits from llama.cpp's on the same weights in F32?

    python benchmarks/logits_against_llama.py MODEL.gguf [ENGINE] [PROMPT ...]

Needs the extra `peer`, and disk for two copies of the model at four bytes a parameter. For each prompt it runs aprlab's
engine greedily over the quantised file and asks llama.cpp, on the dequantised copy, for all log-probabilities after
the prompt and after each further token. Printed: the worst difference of a log-probability and of the most likely
hundred, KL(llama.cpp || aprlab) in nats, whether the top token agrees, and llama.cpp's margin there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from peer import f32_copy, log_softmax, logprobs, serve

from aprlab.formats import open_model
from aprlab.inference.session import Session

PROMPTS = ["What is 2+2?", "Explain quicksort in one sentence.", "Write a Python function that adds two numbers."]
STEPS = 4  # positions after each prompt


def main(path: Path, engine: str = "reference", *prompts: str) -> None:
    """Print one line a position, and the worst of all."""
    model = open_model(path)
    session = Session(model, engine=engine)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        server = serve(f32_copy(path, Path(folder)), threads=2)
        for prompt in prompts or PROMPTS:
            answer = session.generate(prompt, max_tokens=STEPS, keep_logits=True)
            assert answer.logits is not None
            for step, logits in enumerate(answer.logits):
                mine = log_softmax(logits)
                theirs = logprobs(server, [*answer.prompt_tokens, *answer.tokens[:step]], model.config.vocab_size)
                off, top = np.abs(mine - theirs), np.argsort(-theirs)
                kl = float(np.sum(np.exp(theirs) * (theirs - mine)))
                print(
                    f"{prompt[:32]:<33} +{step}  max {off.max():.2e}  top 100 {off[top[:100]].max():.2e}  KL {kl:+.1e}  "
                    f"top 1 {'same' if np.argmax(mine) == top[0] else 'DIFFERS'}  margin {theirs[top[0]] - theirs[top[1]]:.3f}"
                )
                worst = max(worst, float(off.max()))
    print(f"worst difference: {worst:.2e}, engine {session.engine.name} ({session.engine.contract})")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
