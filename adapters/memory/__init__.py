"""How much memory a model and its training take."""
