"""Quantizers behind one interface: see `tokgen.quantizers.base`."""
