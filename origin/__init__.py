"""The origin: the source of artifacts, and of models too large for an edge. Publishing is a library that needs no server."""
