"""The interface to SAM 2 and Hydra: finding and composing configs, patches of the stock Trainer."""
