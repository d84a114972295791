"""Drawn scenes with exact captions, questions and reasons."""
