"""Evaluation of what will run in production: stock predictors, simulated users, metrics with intervals, comparisons."""
