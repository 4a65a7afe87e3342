"""The router: which edge, and why that one. It keeps its last table on disk, so it answers without Kafka too."""
