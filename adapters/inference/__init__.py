"""Answers, reasons and retrieval, from a loaded model."""
