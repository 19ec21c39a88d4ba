"""Views of a Comparison, one module an output."""
