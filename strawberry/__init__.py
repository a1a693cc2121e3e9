"""What the scripts of this repository share."""
