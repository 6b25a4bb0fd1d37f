"""Deployment: stock SAM 2, its predictors, adapters at run time, verification of a merge, ONNX."""
