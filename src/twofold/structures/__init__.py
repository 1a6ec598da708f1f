"""Weights whose sizes are chosen together: what makes a hidden unit or a dimension of a head, and what reads it."""

from twofold.structures.base import Member, Structure
from twofold.structures.find import few_tokens, find_structures

__all__ = ["Member", "Structure", "few_tokens", "find_structures"]
