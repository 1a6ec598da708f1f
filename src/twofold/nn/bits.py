"""How many bits an integer may have, and how many of them share a scale."""

BITS = range(2, 9)  # that a code may have
GROUP = 64  # inputs that share a scale, below eight bits; why: docs/quantize.md
