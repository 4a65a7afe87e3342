"""ONNX: how a model is checked, loaded, tried in a limited child, and run. Imports nothing of ours but `schemas`."""
