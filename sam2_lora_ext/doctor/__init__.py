"""Looks for what would go wrong in a long training: environment, config, checkpoint, data, one real step, disk."""
