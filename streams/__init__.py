"""The log: how facts are stored, folded, followed and audited."""
