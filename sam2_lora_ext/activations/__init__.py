"""Training SAM 2 in less memory and time with the same results to rounding: losses, activations, operations."""
