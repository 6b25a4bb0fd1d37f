"""Training SAM 2 in less memory and time: the loss, what is kept for backward, and some of stock's operations, to
rounding."""
