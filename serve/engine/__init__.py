"""Answers for all who ask at once: who waits, what is begun, what is written token by token, in one thread."""
