"""All that needs a GPU: see ``run.py``."""
