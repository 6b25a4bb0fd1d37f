"""Evaluation under production conditions: stock predictors, simulated users, metrics with intervals, comparisons."""
