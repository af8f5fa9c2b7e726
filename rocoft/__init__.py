"""Row and column fine-tuning: what is selected, and the tasks and models it runs on."""

import importlib
from typing import Any

import lazy_loader
import wrapt

# What is exported, and from where, stands in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("peft")
def _register(peft: Any) -> None:
    """Let peft know RoCoFT, now or as soon as peft is imported."""
    importlib.import_module("rocoft.adapter.model")
