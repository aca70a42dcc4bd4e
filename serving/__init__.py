"""Serving: one ONNX model file behind HTTP, and the same from the command line.

Nothing here imports training code or a deep-learning framework: what serving knows of the
model (class names, version, precision) it reads from the model file's metadata.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime would tell its makers of each session
