"""Distillation: one network learns from others."""
