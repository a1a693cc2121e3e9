"""Text, datasets and training over HTTP (serve.py)."""
