"""Scores of an adapter on data, with their controls, and the files that hold them."""
