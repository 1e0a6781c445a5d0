"""Frozen networks that see pictures: teachers, yardsticks and feature spaces."""
