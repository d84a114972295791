"""Many questions by script: rows in, rows out, on one machine or on many."""
