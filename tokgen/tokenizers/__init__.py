"""Visual tokenizers, one file per system: see `tokgen.tokenizers.base`."""
