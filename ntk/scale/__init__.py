"""Kernels within a memory budget, by several processes, with a file and a cache."""

import lazy_loader

# What is exported, and from where, stands in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
