"""A training run: its folder, record, lock, start and resume, history, checkpoint, signals, random numbers."""
