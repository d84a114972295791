"""Where in a picture something is: what the bridge attends to, and boxes of phrases."""
