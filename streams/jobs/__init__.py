"""Processors of the log, each a process of its own: fold, derive, publish."""
