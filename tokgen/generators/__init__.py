"""Autoregressive generators over text and code ids."""
