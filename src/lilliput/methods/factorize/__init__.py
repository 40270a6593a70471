"""Factorization: layers as products of thin ones."""
