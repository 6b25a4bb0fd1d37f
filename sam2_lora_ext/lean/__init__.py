"""Training SAM 2 in less memory without changing what is computed: the loss, and what is kept for backward."""
