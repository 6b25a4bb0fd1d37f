"""A local web page for clicking on strips and saving pre-labels: `tools/serve.py`. Needs sam2, fastapi, uvicorn."""
