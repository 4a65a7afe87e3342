"""Benchmarks: real processes, every cost paid, one table and one line of ratios each. ``python -m bench [NAME …]``."""
