"""Weft: every module of a model has its own parallel layout, from one laptop to thousands of GPUs.

``weft.recipe``, ``weft.start`` and ``weft.load`` are the Python API (``weft/recipes/api.py``).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The functions of the API, and torch with them, are imported when one is first named."""
    if name in ("recipe", "start", "load"):
        return getattr(import_module("weft.recipes.api"), name)
    raise AttributeError(f"module 'weft' has no attribute {name!r}")
