"""From a prompt to an answer: template, tokens, prefill, one token after another."""

from aprlab.inference.generation import Generation, load_report
from aprlab.inference.sampling import Sampling
from aprlab.inference.session import Session, generate

__all__ = ["Generation", "Sampling", "Session", "generate", "load_report"]
