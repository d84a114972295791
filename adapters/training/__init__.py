"""What the two training loops are made of."""
