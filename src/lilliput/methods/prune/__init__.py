"""Pruning: weights and channels that are not needed."""
