"""Inspection without clicks: strips in, masks of the classes out; fitting, evaluation, files for people."""
