"""File formats of data: one file for each, and a table of them."""
