"""The measurements of bench.py."""
