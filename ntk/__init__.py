"""Empirical neural tangent kernels of Hugging Face models, over chosen parameters.

>>> import ntk
>>> ntk.Rows(3).at("query", "value") + ntk.Bias()  # doctest: +ELLIPSIS
Sum(...)
"""

import lazy_loader

# What is exported, and from where, stands in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
