"""Quantization: few values and few bits."""
