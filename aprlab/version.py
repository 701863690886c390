"""The version of this package, for whoever writes files and reports."""

__version__ = "0.1.0"
