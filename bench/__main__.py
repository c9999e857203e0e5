"""Measures the layers against their peers: ``python -m bench --help``."""

import importlib
import sys

COMMANDS = ("memory", "contention", "compare", "gpu", "report")

arguments = sys.argv[1:]
command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
sys.exit(importlib.import_module(f"bench.{command}").main(arguments))
