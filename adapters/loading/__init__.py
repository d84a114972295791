"""What a recipe names, loaded and put together. A recipe's sections end here."""
