"""Ablations: grids of overrides, their runs, the check that a folder holds such a run."""
