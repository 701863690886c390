"""Programs under test, ours and others': what each can, what it may round, and its trace.

`source` makes one by name; `base.Source` is the protocol that a new one follows.
"""

from aprlab.sources.base import Abilities, Source
from aprlab.sources.choice import source

__all__ = ["Abilities", "Source", "source"]
