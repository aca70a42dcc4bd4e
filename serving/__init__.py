"""Serve one ONNX model file over HTTP, or use it from the command line.

Nothing here imports training code or a deep-learning framework: all that serving knows about the
model (class names, version, precision) comes from the model file's metadata.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # or ONNX Runtime reports each session to its makers
