"""Training SAM 2 in less memory and time without changing what is computed: the loss, what is kept for backward, and stock's dearer operations."""
