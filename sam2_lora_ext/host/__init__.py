"""What touches SAM 2 and Hydra from outside: where configs are, composing them, patches of the stock Trainer."""
