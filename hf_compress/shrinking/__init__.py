"""Smaller students from a teacher, with its weights carried over."""

from .depth import Keep, spread
from .student import Change, Shrunk, cut, shrink

__all__ = ["Change", "Keep", "Shrunk", "cut", "shrink", "spread"]
