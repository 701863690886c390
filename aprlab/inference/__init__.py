"""From a prompt to an answer: template, tokens, prefill, one token after another."""

from aprlab.inference.session import Generation, Sampling, Session, generate, load_report

__all__ = ["Generation", "Sampling", "Session", "generate", "load_report"]
