"""A local web page on which strips are clicked and pre-labels kept: `tools/serve.py`. Needs sam2, fastapi, uvicorn."""
