"""What a model is for: samples, outputs, labels."""

from typing import Literal, TypeAlias

Curvature: TypeAlias = Literal["sampled", "gauss-newton", "empirical"]
