"""Checks to run before a long training: environment, config, checkpoint, data, one real step, disk."""
