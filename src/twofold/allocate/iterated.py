"""Global, twice: the moments are measured again on the model that the first plan makes, and the ranks chosen anew.

The curvature at the dense model says what a small change costs. On the way to the factored model it is another, which the mean of
the moments of both comes nearer to. The second calibration takes as long as the first.
"""

from twofold.allocate.base import allocation
from twofold.allocate.lagrangian import lagrangian

allocation("global-iterated", again=True)(lagrangian)
