"""The command line: one small function for each verb, no knowledge of its own."""

from aprlab.cli.app import app_of, main, run_cli

__all__ = ["app_of", "main", "run_cli"]
