"""ONNX files, written and read: networks in and out of other programs."""
