"""Text in: what the scripts read."""
