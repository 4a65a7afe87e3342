"""The worker: answers predictions out of its caches and its ONNX sessions, from nothing but its own disk."""
