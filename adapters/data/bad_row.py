"""What is raised for one row that cannot be read; its reader adds file and row."""

from __future__ import annotations


class BadRow(Exception):
    """What is wrong with one row, without its place."""
