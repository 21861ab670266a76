"""Smaller students from a teacher, with its weights carried over."""

from .depth import Keep, spread
from .student import Change, Shrunk, check_sizes, cut, shrink
from .vocabulary import cut_vocabulary, shrink_vocabulary
from .width import Width

__all__ = [
    "Change",
    "Keep",
    "Shrunk",
    "Width",
    "check_sizes",
    "cut",
    "cut_vocabulary",
    "shrink",
    "shrink_vocabulary",
    "spread",
]
