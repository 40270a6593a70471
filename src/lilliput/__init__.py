"""Lilliput makes trained PyTorch models small and fast."""
