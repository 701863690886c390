"""The version of this package, which files and reports carry."""

__version__ = "0.1.0"
