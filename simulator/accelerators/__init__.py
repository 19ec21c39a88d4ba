"""Accelerator models: a batch in, seconds per named component out."""
