"""Audit: what the log says happened, asked again. Reads only: no consumer group, no commit, no write."""
