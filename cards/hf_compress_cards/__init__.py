"""Facts to model card: the only input is a folder with its compression.json."""

from .card import render, write

__all__ = ["render", "write"]
