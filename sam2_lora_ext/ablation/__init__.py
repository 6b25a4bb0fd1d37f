"""Ablations: grids of overrides, their runs, the comparison of a folder's run with the grid."""
