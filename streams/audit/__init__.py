"""Audit: what the log says happened, asked again. No consumer group, no commit; only an export writes, to its file."""
