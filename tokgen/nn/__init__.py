"""Building blocks without opinions."""
