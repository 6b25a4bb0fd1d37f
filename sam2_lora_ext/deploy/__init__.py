"""A trained model in use: stock SAM 2, its predictors, live adapters, the proof of a merge, ONNX."""
