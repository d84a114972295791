"""The `querybridge` command."""
