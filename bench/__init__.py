"""Measures the layers against their peers: ``python -m bench --help``."""
