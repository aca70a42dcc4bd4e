"""Turn checkpoints into model files: single ONNX files that hold everything serving needs."""
