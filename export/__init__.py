"""Checkpoints to model files: one ONNX file that holds all that serving needs."""
