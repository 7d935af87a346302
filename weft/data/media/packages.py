"""Packages that only some media need; their extras are named where they are missing."""

import importlib
from importlib.util import find_spec
from types import ModuleType

from weft.config.errors import DataError


def av(why: str) -> ModuleType:
    """PyAV.

    Raises:
        DataError: it is not installed.
    """
    if find_spec("av") is None:
        raise DataError(f"{why} needs the package av: pip install 'weft[video]'")
    return importlib.import_module("av")
