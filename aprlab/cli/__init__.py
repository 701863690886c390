"""The command line: one small function for each verb, no knowledge of its own."""

from aprlab.cli.app import app, main, run_cli

__all__ = ["app", "main", "run_cli"]
