"""The parts of a model: architecture, selection, readouts and loading."""

import lazy_loader

# What is exported, and from where, stands in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# peft registers RoCoFT as soon as it is imported, which needs names of this package:
# import it before any module here does, and after they can be found.
import peft  # noqa: E402, F401
