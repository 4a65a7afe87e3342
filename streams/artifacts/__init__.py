"""The object store: immutable, content-addressed files; written once and read back, fetched chunk by chunk and verified."""

from streams.artifacts.describe import CHUNK_BYTES, describe
from streams.artifacts.fetch import FetchOptions, Source
from streams.artifacts.store import ArtifactStore

__all__ = ["CHUNK_BYTES", "ArtifactStore", "FetchOptions", "Source", "describe"]
