"""Weft: every module of a model has its own parallel layout, from one laptop to thousands of GPUs."""

__version__ = "0.1.0"
