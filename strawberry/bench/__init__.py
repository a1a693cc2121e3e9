"""Measurements behind bench.py."""
