"""The fast lane: usual requests, answered where uvicorn would first make them into ASGI. See `lane.py`."""
