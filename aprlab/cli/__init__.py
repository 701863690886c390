"""The command line: one small function for each verb, no knowledge of its own."""

from aprlab.cli.app import main, run_cli

__all__ = ["main", "run_cli"]
