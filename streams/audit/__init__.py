"""Audit: what the log says happened, asked again. No consumer group, no commit; nothing is written but the file of an export."""
