"""LightningModules, one per way of training, and their callbacks."""
