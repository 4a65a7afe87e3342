"""``python -m mlcdn`` is the `mlcdn` script."""

from mlcdn.cli import main

main()
