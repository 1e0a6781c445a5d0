"""Measures with a stated protocol."""
