"""The onion: the search that takes a broken model apart layer by layer, and the proof by the smallest repair."""

from aprlab.onion.peeling import peel
from aprlab.onion.verdict import Finding, Verdict

__all__ = ["Finding", "Verdict", "peel"]
