"""The command line. One room a noun; `main` is the entry point of the `mlcdn` script."""

from mlcdn.cli.app import main

__all__ = ["main"]
