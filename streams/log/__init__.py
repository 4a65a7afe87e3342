"""Facts in order: what a record is, how it is appended and read; Kafka and an in-memory log behind the same ports."""
