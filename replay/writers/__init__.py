"""Traces in formats of other tools."""
