"""The command line: one small function a verb, no knowledge of its own."""

from aprlab.cli.app import main

__all__ = ["main"]
