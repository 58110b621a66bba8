"""The data sets, what they are corrupted with, and the batches that a training takes from them."""
