"""What makes tools that walk over models take our layers and cells as they take those of ``torch.nn``.

These tools know modules by their exact class or its namespace. Where a tool has a table or a hook, ours are
entered there; where it has none, one function of it is wrapped, and its module says why. A tool that torch
does not import itself is not imported for this, but waited for.
"""
