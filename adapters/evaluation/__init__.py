"""Scores, as the field computes them."""
