"""Inspection without clicks: class masks of whole strips, fitting of the decision, evaluation, pre-labels."""
