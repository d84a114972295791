"""Data sets: pictures, rows, prompts and batches."""
