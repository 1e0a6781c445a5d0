"""Trajectories: which pixels of a clip belong together through time, whoever found them."""
